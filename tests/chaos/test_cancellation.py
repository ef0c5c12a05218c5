"""A request that is cancelled at every place where it waits (F24), for every k the k-th."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from footplate.frontend import AsyncLLMEngine, BeamSearchParams, SamplingParams

from .conftest import Ledger, all_exact

MOST_SUSPENSIONS = 200
PARAMS = SamplingParams(max_tokens=6, temperature=0)
TEXT = "word " * 20


async def cancelled_at(number: int, coroutine: Coroutine[Any, Any, object]) -> bool:
    """Drive a coroutine, and cancel it where it waits for the n-th time; whether it came to that.

    As a task would: what it waits for is cancelled, and the error thrown into it.
    """
    try:
        for _ in range(number):
            await settle(coroutine.send(None))
        waits_for = coroutine.send(None)
    except StopIteration:
        return False
    if waits_for is not None:
        waits_for._asyncio_future_blocking = False
        waits_for.cancel()
    with pytest.raises(asyncio.CancelledError):
        waits_for = coroutine.throw(asyncio.CancelledError())
        while True:  # it tidies up
            await settle(waits_for)
            waits_for = coroutine.send(None)
    return True


async def settle(waits_for: "asyncio.Future[object] | None") -> None:
    """Wait for what a coroutine waits for; None only gives others a turn."""
    if waits_for is None:
        await asyncio.sleep(0)
    else:
        waits_for._asyncio_future_blocking = False
        await asyncio.wait([waits_for])


async def generate(engine: AsyncLLMEngine) -> None:
    async for _ in engine.generate(TEXT, PARAMS):
        pass


async def add(engine: AsyncLLMEngine) -> None:
    stream = await engine.add_request(None, TEXT, PARAMS)
    try:
        async for _ in stream:
            pass
    finally:
        stream.close()


async def search(engine: AsyncLLMEngine) -> None:
    async for _ in engine.beam_search(TEXT, BeamSearchParams(beam_width=2, max_tokens=3)):
        pass


async def ask_for_stats(engine: AsyncLLMEngine) -> None:
    await engine.get_stats()
    await engine.health()


@pytest.mark.parametrize(
    "call",
    [generate, *(pytest.param(c, marks=pytest.mark.chaos) for c in (add, search, ask_for_stats))],
)
async def test_cancelling_at_any_place_leaves_nothing_behind(
    ledger: Ledger, call: Callable[[AsyncLLMEngine], Coroutine[Any, Any, None]]
) -> None:
    async with ledger.engine("runner.execute:sleep=0.001") as engine:
        await call(engine)  # undisturbed, and everything is loaded
        number = 0
        while await cancelled_at(number, call(engine)):
            number += 1
            assert number < MOST_SUSPENSIONS
        assert number > 1, "there was nowhere to cancel it"
        await all_exact(engine, 2)


@pytest.mark.chaos
async def test_cancelling_tasks_at_any_turn_leaves_nothing_behind(ledger: Ledger) -> None:
    async with ledger.engine("runner.execute:sleep=0.001") as engine:
        for call in (generate, add, search):
            for number in range(60):
                task = asyncio.create_task(call(engine))
                for _ in range(number):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
        await all_exact(engine, 2)
