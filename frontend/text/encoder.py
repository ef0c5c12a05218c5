"""From text to token ids, with special tokens read as tokens or as the characters they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from footplate.frontend.text.literal_text import LiteralText
from footplate.protocol.errors import InvalidRequestError

if TYPE_CHECKING:
    import tokenizers


class Encoder:
    """Text to ids for one vocabulary.

    Args:
        backend: the library's tokenizer.
        special_tokens: id to text of all special tokens.
        unk_token: the one among them that stands for unknown characters, if any.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[int, str],
        unk_token: str | None,
    ) -> None:
        self._backend = backend
        self.literal_text = LiteralText(special_tokens.values())
        # The token for unknown characters says nothing to a model, and any text may contain it.
        unknown = {unk_token, getattr(backend.model, "unk_token", None)}
        self._control_ids = frozenset(
            token_id for token_id, token in special_tokens.items() if token not in unknown
        )

    def encode(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """Turn text into ids; see `Tokenizer.encode`."""
        encoding = self._encode(text)
        whole = self._backend.post_process(encoding) if add_special_tokens else encoding
        if allow_special or not self._holds_special_tokens(text, encoding.ids):
            return whole.ids
        ids = self.encode_marked(self.literal_text.mark(text))
        if not self._control_ids.isdisjoint(ids):
            # The normalizer turned other characters into a special token's.
            ids = self._encode_literally(text)
        before, after = _around(encoding.ids, whole.ids)
        return [*before, *ids, *after]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Turn many texts into ids, special tokens read as tokens, on all cores."""
        with _surrogates_refused():
            encodings = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        return [encoding.ids for encoding in encodings]

    def encode_marked(self, text: str) -> list[int]:
        """Turn text into ids in which `literal_text` has marked what to take literally."""
        ids: list[int] = []
        for n, (piece, is_literal) in enumerate(self.literal_text.split(text)):
            encode = self._encode_literally if is_literal else self._encode_plainly
            ids += self._encode_behind(encode, piece) if n else encode(piece)
        return ids

    @cached_property
    def _newline_ids(self) -> list[int]:
        return self._encode_plainly("\n")

    def _holds_special_tokens(self, text: str, ids: list[int]) -> bool:
        return self.literal_text.occurs_in(text) or not self._control_ids.isdisjoint(ids)

    def _encode(self, text: str) -> tokenizers.Encoding:
        # Half the time of `encode`, for it computes no offsets into the text.
        with _surrogates_refused():
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0]

    def _encode_plainly(self, text: str) -> list[int]:
        return self._encode(text).ids

    def _encode_behind(self, encode: Callable[[str], list[int]], piece: str) -> list[int]:
        """Encode a piece from the middle of a text.

        Behind a newline, because a SentencePiece-like tokenizer would put a space before the
        first word of a text; the newline is taken away again, unless it melted into the piece.
        """
        ids = encode("\n" + piece)
        num_newline_ids = len(self._newline_ids)
        if ids[:num_newline_ids] == self._newline_ids:
            return ids[num_newline_ids:]
        return encode(piece)

    def _encode_literally(self, text: str) -> list[int]:
        """Encode text as if the vocabulary had no added tokens."""
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        words = [text]
        if pre_tokenizer is not None:
            words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        return [token_id for word in words for token_id in self._tokenize(word)]

    def _tokenize(self, word: str) -> list[int]:
        ids = [token.id for token in self._backend.model.tokenize(word)]
        if len(word) > 1 and not self._control_ids.isdisjoint(ids):
            # Unigram models hold their special tokens as words too: take the word apart.
            middle = len(word) // 2
            return self._tokenize(word[:middle]) + self._tokenize(word[middle:])
        return ids


def _around(inside: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """What a post-processor put before and after `inside`."""
    for start in range(len(whole) - len(inside) + 1):
        end = start + len(inside)
        if whole[start:end] == inside:
            return whole[:start], whole[end:]
    raise AssertionError("the post-processor changed the text's own tokens")


@contextmanager
def _surrogates_refused() -> Iterator[None]:
    """Half of a surrogate pair is no character; JSON and file names can smuggle one in."""
    try:
        yield
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidRequestError(
            "text must be a string without lone surrogates (U+D800 to U+DFFF)"
        ) from error
