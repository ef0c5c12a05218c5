"""A core, and clients that park, leave, come back and drain it."""

from pathlib import Path
from typing import Any

from footplate.protocol.messages import (
    AbortRequests,
    Attached,
    AttachRequest,
    ControlReply,
    Drain,
    ParkRequests,
    ResumeRequests,
    StepOutputs,
)

from .test_engine_core import ALICE, BOB, NUM_BLOCKS, Driver, expected

__all__ = ["ALICE", "BOB", "NUM_BLOCKS", "FlowDriver", "expected"]


class FlowDriver(Driver):
    """Knows runs of tokens, and replies.

    Attributes:
        replies: all that came beside the outputs.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.replies: list[tuple[bytes, Attached | ControlReply]] = []

    def step(self) -> list[tuple[bytes, StepOutputs]]:
        """As the busy loop has it."""
        self.core.step()
        self.core.check_ledger()
        self.replies += self.core.take_replies()
        outputs = self.core.take_outputs()
        self.core.check_ledger()
        self.outputs += outputs
        return outputs

    def runs(self, client: bytes, handle: int) -> list[tuple[int, list[int]]]:
        """What a client was told of one handle: positions, and the tokens from there on."""
        runs = []
        for owner, out in self.outputs:
            start = 0
            counts = out.counts or [1] * len(out.handles)
            for one, position, count in zip(out.handles, out.positions, counts, strict=True):
                if (owner, one) == (client, handle):
                    runs.append((position, out.token_ids[start : start + count]))
                start += count
            assert start == len(out.token_ids)
        return runs

    def tokens(self, client: bytes, handle: int) -> list[int]:
        """As the client has them, from position 0 on; nothing is missing and nothing comes
        twice."""
        tokens: list[int] = []
        for position, run in self.runs(client, handle):
            assert position == len(tokens)
            tokens += run
        return tokens

    def park(self, client: bytes, *handles: int) -> None:
        self.core.handle(client, ParkRequests(list(handles)))
        self.core.check_ledger()

    def resume(self, client: bytes, *handles: int) -> None:
        self.core.handle(client, ResumeRequests(list(handles)))
        self.core.check_ledger()

    def abort(self, client: bytes, *handles: int, have_ended: bool = False) -> None:
        self.core.handle(client, AbortRequests(list(handles), have_ended))
        self.core.check_ledger()

    def attach(self, client: bytes, handle: int, request_id: str) -> None:
        self.core.handle(client, AttachRequest(handle, request_id))
        self.core.check_ledger()

    def lose(self, client: bytes) -> None:
        """Its connection goes."""
        self.core.leave(client, may_return=True)
        self.core.check_ledger()

    def drain(self, client: bytes, call: int, timeout_s: float | None = None) -> Any:
        return self.core.handle(client, Drain(call, timeout_s))

    def attached(self, client: bytes) -> list[Attached]:
        return [m for owner, m in self.replies if owner == client and isinstance(m, Attached)]

    def check_empty(self) -> None:
        """Nothing goes on, and all blocks are free."""
        stats = self.core.stats()
        live = (stats.num_running, stats.num_waiting, stats.num_parked)
        assert live == (0, 0, 0)
        assert stats.num_free_blocks == NUM_BLOCKS
        assert not self.core.has_work
