"""The bytes a token stands for.

A text is not the sum of its tokens' texts: half a character has no text, and the first token of
a text may lose its leading space. It is, however, the sum of its tokens' *bytes*, for every
decoder the known model families ship. This module takes such a decoder apart, once per
tokenizer, into "bytes of a token inside a text" and "bytes of a token that starts one".

Knows nothing about streams: `detokenizer.py` joins the bytes and decides what can be shown.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# Put in front of a token to see what the decoder makes of it inside a text.
_ANCHOR = "a"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PER_TOKEN_STEPS = ("Replace",)
_FUSED_TAILS = (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"])


def _one_replacement_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# Byte-level tokenizers show one U+FFFD per broken character (as `bytes.decode` does), those with
# byte fallback one per broken byte (as SentencePiece does).
_PER_BYTE = "footplate.one-replacement-per-byte"
codecs.register_error(_PER_BYTE, _one_replacement_per_byte)


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """A decoder, taken apart: text = decode(first(t0) + inside(t1) + inside(t2) + ...).

    inside: bytes of a token that has another before it.
    first: bytes of a token that starts a text.
    errors: the codec error handler that shows bytes which are no UTF-8.
    strip: the character, if any, of which up to `max_stripped` are cut from the text's start.
    """

    inside: Callable[[str], bytes]
    first: Callable[[str], bytes]
    errors: str = "replace"
    strip: str = ""
    max_stripped: int = 0


def take_apart(backend: tokenizers.Tokenizer) -> TokenBytes | None:
    """Describe `backend`'s decoder token by token; None when it is of an unknown shape."""
    decoder = backend.decoder
    if decoder is None:  # tokenizers joins such tokens with spaces
        return TokenBytes(inside=lambda token: b" " + token.encode(), first=str.encode)
    # The decoder's own state: serialising the whole tokenizer would write out its vocabulary.
    steps = _flatten(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(inside=_byte_level, first=_byte_level)
    if decoder.decode([_ANCHOR]) != _ANCHOR:
        return None

    def inside(token: str) -> bytes:
        text: str = decoder.decode([_ANCHOR, token])[len(_ANCHOR) :]
        return text.encode()

    if kinds in (["Metaspace"], ["WordPiece"]):
        return TokenBytes(inside=inside, first=lambda token: decoder.decode([token]).encode())

    while kinds and kinds[0] in _PER_TOKEN_STEPS:
        del kinds[0]
    if kinds not in _FUSED_TAILS:
        return None

    def inside_with_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else inside(token)

    strip: dict[str, Any] = {"content": "", "start": 0, "stop": 0}
    if kinds[-1] == "Strip":
        strip = steps[-1]
    if strip["stop"]:  # cut from the end of the text: only the last token would know
        return None
    return TokenBytes(
        inside=inside_with_bytes,
        first=inside_with_bytes,
        errors=_PER_BYTE,
        strip=strip["content"],
        max_stripped=strip["start"],
    )


def token_of(backend: tokenizers.Tokenizer, token_id: int) -> str | None:
    """The vocabulary's spelling of a token, or None: also for a number that is no id to any
    vocabulary, which the library would refuse with an error."""
    return backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None


class PieceTable(dict[int, bytes]):
    """Token id to bytes inside a text, filled in as tokens are met, shared by all streams.

    A skipped special token and an id outside the vocabulary (models pad theirs) have no bytes.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, token_bytes: TokenBytes, skipped: frozenset[int]
    ) -> None:
        super().__init__()
        self._backend = backend
        self._skipped = skipped
        self.token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        token = token_of(self._backend, token_id)
        if token is None:
            # Not stored: such ids come from callers, and there are more of them than memory.
            return b""
        piece = b"" if token_id in self._skipped else self.token_bytes.inside(token)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> bytes | None:
        """The bytes of a token that starts a text, or None if it is not shown at all."""
        token = token_of(self._backend, token_id)
        if token is None or token_id in self._skipped:
            return None
        return self.token_bytes.first(token)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(hidden)
    }


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # an added token outside the table, such as one with a space in it
        return token.encode()
