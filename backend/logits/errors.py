"""How a row fails, and takes nobody with it."""

from footplate.backend.step import RowError
from footplate.protocol.messages import ErrorKind


class RowFailed(Exception):
    """The request of this row cannot go on."""

    def __init__(self, kind: ErrorKind, message: str, *, is_corrupted: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.is_corrupted = is_corrupted

    @property
    def error(self) -> RowError:
        """As the step reports it."""
        return RowError(self.kind, str(self), self.is_corrupted)
