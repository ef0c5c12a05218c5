"""Control calls: a message to the core, and its answer."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from footplate.protocol.errors import EngineError
from footplate.protocol.messages import ControlReply, Drain, GetStats, ResetPrefixCache

ControlCall = ResetPrefixCache | GetStats | Drain


@dataclass(frozen=True, slots=True)
class _Pending:
    message: ControlCall
    since: float
    reply: "asyncio.Future[ControlReply]"


class ControlCalls:
    """Owns the calls that wait for an answer. They outlive a core: none of them does any harm when
    it is made twice.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[int, _Pending] = {}
        self._num_calls = 0

    def __len__(self) -> int:
        return len(self._pending)

    def replay(self) -> list[ControlCall]:
        """What to ask another core, in order: all that the one before has not answered. A drain
        has what is left of its time."""
        now = self._clock()
        return [_as_of(pending, now) for pending in self._pending.values()]

    async def call(
        self, make: Callable[[int], ControlCall], send: Callable[[ControlCall], None]
    ) -> ControlReply:
        """Make a call and wait for its answer.

        Args:
            make: the message, given its number.

        Raises:
            EngineError: the engine ended before.
        """
        self._num_calls += 1
        message = make(self._num_calls)
        reply: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._pending[message.call] = _Pending(message, self._clock(), reply)
        try:
            send(message)
            return await reply
        finally:
            self._pending.pop(message.call, None)

    def answer(self, reply: ControlReply) -> None:
        """The core has answered. Nobody may wait any longer."""
        pending = self._pending.get(reply.call)
        if pending is not None and not pending.reply.done():
            pending.reply.set_result(reply)

    def fail(self, error: EngineError) -> None:
        """No answer will come."""
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(error)


def _as_of(pending: _Pending, now: float) -> ControlCall:
    message = pending.message
    if isinstance(message, Drain) and message.timeout_s is not None:
        passed_s = now - pending.since
        return replace(message, timeout_s=max(0.0, message.timeout_s - passed_s))
    return message
