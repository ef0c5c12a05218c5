"""What goes wrong or comes to an end in a runner, as a pure function of the request's place: the
runner does it, and the oracle knows it."""

from zlib import crc32

from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import Grammar

ERRORS = (ErrorKind.LOGITS, ErrorKind.PROCESSOR, ErrorKind.GRAMMAR)


class Marks:
    """Of a hundred thousand places (client, handle, output position), `rate` are errors and as
    many are the end of a grammar."""

    def __init__(self, rate: int) -> None:
        self._rate = rate

    def error_at(self, client: bytes, handle: int, position: int) -> ErrorKind | None:
        """The error of this row, if it is one."""
        place = self._place(client, handle, position)
        return ERRORS[place % len(ERRORS)] if place < self._rate else None

    def is_complete_at(
        self, client: bytes, handle: int, position: int, grammar: Grammar | None
    ) -> bool:
        """Whether the grammar of this request ends with this token."""
        return self._rate <= self._place(client, handle, position) < 2 * self._rate

    def is_complete_before(
        self, client: bytes, handle: int, position: int, grammar: Grammar | None
    ) -> bool:
        """Whether the grammar of a request that comes with this much output has ended in it."""
        return 2 * self._rate <= self._place(client, handle, position) < 16 * self._rate

    def _place(self, client: bytes, handle: int, position: int) -> int:
        if not self._rate:
            return 100_000
        return crc32(b"%s %d %d" % (client, handle, position)) * 40_503 % 2**32 % 100_000
