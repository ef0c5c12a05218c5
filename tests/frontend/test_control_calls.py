"""Calls that outlive a core."""

import asyncio
from collections.abc import Callable

import pytest

from footplate.frontend.control_calls import ControlCall, ControlCalls
from footplate.protocol.errors import EngineClosedError
from footplate.protocol.messages import ControlReply, Drain, GetStats, ResetPrefixCache


class Caller:
    """Owns calls, what was sent of them, and the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls = ControlCalls(lambda: self.now)
        self.sent: list[ControlCall] = []

    async def call(self, make: Callable[[int], ControlCall]) -> "asyncio.Task[ControlReply]":
        task = asyncio.create_task(self.calls.call(make, self.sent.append))
        await asyncio.sleep(0)
        return task


def drain(timeout_s: float | None) -> Callable[[int], Drain]:
    return lambda number: Drain(number, timeout_s)


async def test_what_was_answered_is_not_asked_again_and_the_rest_is_in_order() -> None:
    caller = Caller()
    first = await caller.call(GetStats)
    others = [await caller.call(GetStats), await caller.call(ResetPrefixCache)]
    caller.calls.answer(ControlReply(1, True))
    assert (await first).ok
    assert caller.sent == [GetStats(1), GetStats(2), ResetPrefixCache(3)]
    assert caller.calls.replay() == [GetStats(2), ResetPrefixCache(3)]
    caller.calls.answer(ControlReply(99, True))  # nobody has asked
    caller.calls.fail(EngineClosedError("the engine was shut down"))
    for task in others:
        with pytest.raises(EngineClosedError):
            await task
    assert not caller.calls and not caller.calls.replay()


async def test_a_drain_has_what_is_left_of_its_time_in_each_core_that_comes() -> None:
    caller = Caller()
    tasks = [await caller.call(drain(timeout_s)) for timeout_s in (30.0, 8.0, 0.0, None)]
    assert caller.sent == [Drain(1, 30.0), Drain(2, 8.0), Drain(3, 0.0), Drain(4, None)]
    caller.now += 10.0
    tasks.append(await caller.call(drain(7.0)))
    assert caller.calls.replay() == [
        Drain(1, 20.0), Drain(2, 0.0), Drain(3, 0.0), Drain(4, None), Drain(5, 7.0)
    ]  # fmt: skip
    caller.now += 5.0
    assert [call.timeout_s for call in caller.calls.replay() if isinstance(call, Drain)] == [
        15.0, 0.0, 0.0, None, 2.0
    ]  # fmt: skip
    for number, task in enumerate(tasks, 1):
        caller.calls.answer(ControlReply(number, True))
        assert (await task).ok
