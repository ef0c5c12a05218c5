"""From token ids to text that can be shown, while the ids are still coming.

Owns one request's unfinished character, at most three bytes, and nothing else. What a token
stands for is `pieces.py`'s knowledge; stop strings are `stop_strings.py`'s.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Protocol

from footplate.frontend.text.pieces import PieceTable

# The longest run of bytes that can still become a character: four, less the one that is missing.
_MAX_UNFINISHED_BYTES = 3


class Detokenizer(Protocol):
    """Turns one request's token ids into text, piece by piece.

    Two promises, for any ids whatsoever:

    * No text is taken back. U+FFFD is shown only for bytes that no later token can complete.
    * The deltas join exactly to the *full decode*, however the ids were split into calls.

    The full decode is the text the output ids add behind the prompt: the decode of prompt and
    output together, less the decode of the prompt. A leading space that a SentencePiece-like
    tokenizer drops at the start of a text is therefore kept; for byte-level BPE it is simply
    `decode(output)`. Should the prompt end inside a character, its bytes count towards the
    output's first character; if the output has none, they are not shown.
    """

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` complete; one call for many ids is the cheapest."""
        ...

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character the output never finished."""
        ...


class PieceDetokenizer:
    """The detokenizer of every decoder that `take_apart` understands.

    The text is the UTF-8 decode of a byte string that only grows, so all there is to remember is
    its undecodable end. Each byte is looked at once, whatever the ids are: 0.25 us per token fed
    one by one, 0.07 us in calls of sixteen (`tokenizers.DecodeStream` takes 0.4 to 1.8).
    """

    __slots__ = (
        "_at_start",
        "_errors",
        "_pending",
        "_pieces",
        "_to_strip",
        "_unsettled",
        "_untouched",
    )

    def __init__(self, pieces: PieceTable, prompt_token_ids: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._errors = pieces.token_bytes.errors
        self._pending = b""
        self._at_start = True  # no token has been shown
        self._to_strip = pieces.token_bytes.max_stripped  # characters that may still be cut
        self._untouched = True  # `_pending` is the prompt's alone
        self._unsettled = True  # any of the three: `feed` checks one flag
        if prompt_token_ids:
            self._settle_behind(prompt_token_ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        if self._unsettled:
            return self._feed_unsettled(token_ids)
        return self._decode(self._bytes_of(token_ids))

    def finish(self) -> str:
        if self._untouched:
            return ""
        text, _ = utf_8_decode(self._pending, self._errors, True)
        self._pending = b""
        return text

    def _decode(self, data: bytes) -> str:
        if self._pending:
            data = self._pending + data
        text, num_decoded = utf_8_decode(data, self._errors, False)
        self._pending = data[num_decoded:]
        return text

    def _bytes_of(self, token_ids: Sequence[int]) -> bytes:
        if len(token_ids) == 1:
            return self._pieces[token_ids[0]]
        return b"".join(map(self._pieces.__getitem__, token_ids))

    def _feed_unsettled(self, token_ids: Sequence[int]) -> str:
        """Feed the start of a text, and the first bytes behind a prompt."""
        data = self._bytes_of(token_ids)
        if self._at_start:
            for token_id in token_ids:
                first = self._pieces.first(token_id)
                if first is not None:
                    data = first + data[len(self._pieces[token_id]) :]
                    self._at_start = False
                    break
        text = self._decode(data)
        while self._to_strip and text:
            if text[0] == self._pieces.token_bytes.strip:
                text = text[1:]
                self._to_strip -= 1
            else:
                self._to_strip = 0
        self._untouched = self._untouched and not data
        self._unsettled = self._at_start or self._to_strip > 0 or self._untouched
        return text

    def _settle_behind(self, prompt_token_ids: Sequence[int]) -> None:
        """Take over the state that decoding the whole prompt would leave, from its end alone."""
        # A character is at most four bytes: these reach past all that might be stripped, and past
        # the beginning of a character that is unfinished. What came before makes no difference.
        num_bytes_needed = 4 * self._to_strip + _MAX_UNFINISHED_BYTES + 1
        start = len(prompt_token_ids)
        num_bytes = 0
        while start and num_bytes < num_bytes_needed:
            start -= 1
            num_bytes += len(self._pieces[prompt_token_ids[start]])
        self._feed_unsettled(prompt_token_ids[start:])
        self._untouched = self._unsettled = True


class SpacelessDetokenizer(PieceDetokenizer):
    """Shows an added token that follows another one without the space the decoder puts there.

    This is `spaces_between_special_tokens=False`; it matters for decoders that separate words,
    such as WordPiece's, and only when special tokens are shown.
    """

    __slots__ = ("_added_tokens", "_last_was_added")

    def __init__(
        self,
        pieces: PieceTable,
        prompt_token_ids: Sequence[int],
        added_tokens: Mapping[int, bytes],
    ) -> None:
        self._added_tokens = added_tokens
        self._last_was_added = False
        super().__init__(pieces, prompt_token_ids)

    def _bytes_of(self, token_ids: Sequence[int]) -> bytes:
        parts = []
        for token_id in token_ids:
            bare = self._added_tokens.get(token_id)
            is_added = bare is not None
            parts.append(
                bare if bare is not None and self._last_was_added else self._pieces[token_id]
            )
            self._last_was_added = is_added
        return b"".join(parts)


class WindowDetokenizer:
    """For a decoder of unknown shape: decodes a short window again and again.

    Keeps both promises as long as a token's text depends on no more than the `CONTEXT` shown
    tokens before it. Text that would end in U+FFFD waits for up to `CONTEXT` tokens, not longer:
    every wait decodes the window again, and a run of undecodable bytes must not become quadratic.

    Args:
        decode: the decoder.
        is_shown: whether a token has any text; the others would only use up the window.
        prompt_token_ids: only the last few that are shown are looked at.
    """

    CONTEXT = 8

    __slots__ = ("_context_text", "_decode", "_is_shown", "_num_context", "_window")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_shown: Callable[[int], bool],
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._is_shown = is_shown
        self._window = list(islice(filter(is_shown, reversed(prompt_token_ids)), self.CONTEXT))
        self._window.reverse()
        self._keep_context()

    def feed(self, token_ids: Sequence[int]) -> str:
        self._window.extend(filter(self._is_shown, token_ids))
        text = self._decode(self._window)
        num_waiting = len(self._window) - self._num_context
        if text.endswith("\ufffd") and num_waiting < self.CONTEXT:
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        shown = _common_length(text, self._context_text)
        self._keep_context()
        return text[shown:]

    def _keep_context(self) -> None:
        del self._window[: -self.CONTEXT]
        self._num_context = len(self._window)
        self._context_text = self._decode(self._window)


def _common_length(a: str, b: str) -> int:
    if a.startswith(b):
        return len(b)
    return next(n for n, (x, y) in enumerate(zip(a + "\0", b, strict=False)) if x != y)
