"""What clients are to be told at the next border between two steps, in columns."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
from msgspec.structs import replace

from footplate.backend.step import ScoredRows
from footplate.protocol.messages import (
    ErrorKind,
    Finished,
    FinishReason,
    LogprobRows,
    Started,
    StepOutputs,
)

# Rows of logprobs may be as long as the vocabulary, and ends come by the ten thousand with a large
# `n`. A message with more bytes of them than this is closed and another begun: frames have a limit
# (`codec.MAX_FRAME_BYTES`).
MAX_COLUMN_BYTES = 4 * 2**20
# Why a request failed may be told in the words of code that is not ours.
MAX_MESSAGE_CHARS = 2000
FINISHED_BYTES = 32  # at most, beside the message
MAX_RUN_TOKENS = 2**18  # in one message, of what a request has produced before


class Columns(msgspec.Struct):
    """The next message for one client."""

    handles: list[int] = []
    positions: list[int] = []
    token_ids: list[int] = []
    started: list[Started] = []
    finished: list[Finished] = []
    logprobs: list[LogprobRows] = []
    prompt_logprobs: list[LogprobRows] = []
    num_weighed_bytes: int = 0


class Delivery:
    """Owns what has been produced and not been taken."""

    def __init__(
        self, epoch: int, on_end: Callable[[bytes, Finished], None] = lambda client, end: None
    ) -> None:
        """Args:
        on_end: called with every end that is to be told, and to whom.
        """
        self._epoch = epoch
        self._on_end = on_end
        self._columns: dict[bytes, Columns] = {}
        self._full: list[tuple[bytes, StepOutputs]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._columns)

    def to(self, client: bytes) -> Columns:
        """The columns to write to, for this client and now."""
        columns = self._columns.get(client)
        if columns is None:
            columns = self._columns[client] = Columns()
        return columns

    def end(
        self,
        client: bytes,
        handle: int,
        reason: FinishReason,
        message: str = "",
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        """A request has ended."""
        columns = self.to(client)
        text = _sendable(message) if message else message
        finished = Finished(handle, reason, text, kind)
        columns.finished.append(finished)
        self._on_end(client, finished)
        self._weigh(client, columns, FINISHED_BYTES + 4 * len(text))

    def score(self, client: bytes, handle: int, position: int, rows: ScoredRows) -> None:
        """Logprobs of the token that was written last, at output `position`."""
        columns = self.to(client)
        columns.logprobs.append(
            LogprobRows(handle, position, rows.ranks, rows.token_ids, rows.logprobs)
        )
        self._weigh(client, columns, len(rows.token_ids) + len(rows.logprobs))

    def score_prompt(self, client: bytes, handle: int, rows: ScoredRows) -> None:
        """Logprobs of tokens of a prompt."""
        for part in _split(rows):
            columns = self.to(client)
            columns.prompt_logprobs.append(
                LogprobRows(handle, part.position, part.ranks, part.token_ids, part.logprobs)
            )
            self._weigh(client, columns, len(part.token_ids) + len(part.logprobs))

    def tell_again(
        self, client: bytes, handle: int, token_ids: list[int], started: Started | None
    ) -> None:
        """All that a request has produced so far, in messages of their own behind what has been
        written already."""
        if not token_ids:
            return
        if (written := self._columns.get(client)) is not None:
            self._full.append((client, self._close(written)))
        self._columns[client] = Columns()  # see `_weigh`
        for position in range(0, len(token_ids), MAX_RUN_TOKENS):
            run = token_ids[position : position + MAX_RUN_TOKENS]
            columns = Columns([handle], [position], run)
            if started is not None and not position:
                columns.started.append(replace(started, handle=handle))
            self._full.append((client, self._close(columns, [len(run)])))

    def _weigh(self, client: bytes, columns: Columns, num_bytes: int) -> None:
        columns.num_weighed_bytes += num_bytes
        if columns.num_weighed_bytes > MAX_COLUMN_BYTES:
            self._full.append((client, self._close(columns)))
            # Still there, so that the client is known to have something to take.
            self._columns[client] = Columns()

    def _close(self, c: Columns, counts: Sequence[int] = ()) -> StepOutputs:
        return StepOutputs(
            epoch=self._epoch,
            handles=c.handles,
            positions=c.positions,
            token_ids=c.token_ids,
            counts=list(counts),
            started=c.started,
            finished=c.finished,
            logprobs=c.logprobs,
            prompt_logprobs=c.prompt_logprobs,
        )

    def take(self) -> list[tuple[bytes, StepOutputs]]:
        """Everything, in order; each output is handed out once."""
        if not self._columns:
            return []
        outputs, self._full = self._full, []
        taken, self._columns = self._columns, {}
        outputs += [(client, self._close(columns)) for client, columns in taken.items()]
        return outputs

    def forget(self, client: bytes) -> None:
        """A client has left."""
        if self._columns.pop(client, None) is not None:
            self._full = [entry for entry in self._full if entry[0] != client]


def _sendable(message: str) -> str:
    """Short enough, and text that UTF-8 can carry."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
    return message.encode(errors="replace").decode()


def _split(rows: ScoredRows) -> Iterator[ScoredRows]:
    """Parts of at most `MAX_COLUMN_BYTES`, or of one row."""
    num_rows = len(rows.ranks)
    row_bytes = len(rows.token_ids) // num_rows  # of ids, and as many of logprobs
    step = max(1, MAX_COLUMN_BYTES // (2 * row_bytes))
    for start in range(0, num_rows, step):
        part = slice(start * row_bytes, (start + step) * row_bytes)
        yield ScoredRows(
            rows.position + start,
            rows.ranks[start : start + step],
            rows.token_ids[part],
            rows.logprobs[part],
        )
