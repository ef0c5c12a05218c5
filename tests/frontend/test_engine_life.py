"""Waiting for the end of an engine that may have several lives."""

import asyncio

import pytest

from footplate.frontend.engine_life import EngineLife
from footplate.frontend.engine_state import EngineEvent, EngineState
from footplate.protocol.errors import EngineClosedError, EngineDeadError, EngineNotReadyError

ERROR = EngineDeadError("the core is gone")


def begun() -> EngineLife:
    life = EngineLife()
    life.advance(EngineEvent.START)
    life.advance(EngineEvent.READY)
    return life


async def waiting(life: EngineLife) -> "asyncio.Task[object]":
    """Somebody who waits for its end by now."""
    task: asyncio.Task[object] = asyncio.create_task(life.wait_until_dead())
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_whoever_waits_for_its_death_is_told_why_before_it_and_after_it() -> None:
    life = begun()
    task = await waiting(life)
    life.die(ERROR)
    assert await task is ERROR
    assert await life.wait_until_dead() is ERROR


async def test_a_life_after_a_death_is_waited_for_anew() -> None:
    life = begun()
    life.die(ERROR)
    life.stop()
    life.advance(EngineEvent.START)
    task = await waiting(life)
    again = EngineDeadError("again")
    life.die(again)
    assert await task is again


async def test_whoever_waits_for_a_death_that_does_not_come_is_told_so() -> None:
    life = begun()
    task = await waiting(life)
    life.stop()
    life.advance(EngineEvent.START)
    with pytest.raises(EngineClosedError, match="shut down"):
        await task


async def test_a_death_that_was_cleared_away_before_its_waiter_had_a_turn_is_no_death() -> None:
    life = begun()
    task = await waiting(life)
    life.die(ERROR)
    life.stop()
    with pytest.raises(EngineClosedError):
        await task


def test_an_engine_may_be_waited_for_in_one_event_loop_after_another() -> None:
    life = EngineLife()

    async def live() -> None:
        life.advance(EngineEvent.START)
        task = await waiting(life)
        life.die(ERROR)
        assert await task is ERROR
        life.stop()

    asyncio.run(live())
    asyncio.run(live())


def test_only_an_engine_that_serves_can_be_asked_to() -> None:
    life = EngineLife()
    with pytest.raises(EngineClosedError, match="has not been started"):
        life.require_serving()
    life.advance(EngineEvent.START)
    with pytest.raises(EngineClosedError, match="still starting"):
        life.require_serving()
    assert not life.has_core
    life.advance(EngineEvent.READY)
    life.require_serving()
    life.advance(EngineEvent.LOSE)
    assert life.has_core
    with pytest.raises(EngineNotReadyError, match="being replaced"):
        life.require_serving()
    life.die(ERROR)
    assert not life.has_core
    with pytest.raises(EngineDeadError) as raised:
        life.require_serving()
    assert raised.value is ERROR
    life.stop()
    assert (life.state, life.dead_error) == (EngineState.STOPPED, None)
    with pytest.raises(EngineClosedError, match="was shut down"):
        life.require_serving()
