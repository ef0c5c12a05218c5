"""The core is stopped or hangs (F8 to F10), or is only slow: which is neither."""

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from .conftest import PATIENCE_S, Ledger, all_exact

SLOW_STEPS = "runner.execute:sleep=0.004"
IMPATIENT: dict[str, Any] = {"stall_timeout_s": 0.4, "hang_timeout_s": 1.2}


async def test_a_stopped_core_is_noticed_and_goes_on_where_it_was(ledger: Ledger) -> None:
    async with ledger.engine(SLOW_STEPS) as engine:
        streams = asyncio.create_task(all_exact(engine, 24))
        await asyncio.sleep(0.1)
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGSTOP)
        since = time.monotonic()
        try:
            while (await engine.health()).is_ready:  # it asks, and waits for an answer
                assert time.monotonic() - since < PATIENCE_S
            noticed_s = time.monotonic() - since
        finally:
            os.kill(engine.process_id, signal.SIGCONT)
        await streams
    assert noticed_s < 1.5
    assert not ledger.restarts


@pytest.mark.parametrize(
    "rule",
    [
        "runner.execute:hang@20",
        pytest.param("runner.execute:hang_gil@20", marks=pytest.mark.chaos),
        pytest.param("core.step:hang@20", marks=pytest.mark.chaos),
        pytest.param("core.outputs:hang@20", marks=pytest.mark.chaos),
        pytest.param("core.sent:hang_gil@20", marks=pytest.mark.chaos),
        pytest.param("core.outputs:stop@20", marks=pytest.mark.chaos),
        pytest.param("inbox.receive:hang_gil@8", marks=pytest.mark.chaos),
        pytest.param("inbox.receive:hang@8", marks=pytest.mark.chaos),
    ],
)
async def test_a_core_that_hangs_is_ended_and_streams_go_on_in_the_next(
    ledger: Ledger, capfd: pytest.CaptureFixture[str], rule: str
) -> None:
    async with ledger.engine(rule, **IMPATIENT) as engine:
        await all_exact(engine, 24)
    [restart] = ledger.restarts
    assert "had not got any further for 1.2 s" in restart.cause
    if "stop" not in rule:  # the others can still be made to say where they are
        assert "most recent call first" in capfd.readouterr().err


async def test_a_core_is_slow_and_not_hung_as_long_as_its_steps_end(ledger: Ledger) -> None:
    # Each step takes longer than what has its stacks written, and all of them together much
    # longer than what counts as hung.
    async with ledger.engine("runner.execute:sleep=0.6", **IMPATIENT) as engine:
        await all_exact(engine, 4, count=5)
    assert not ledger.restarts


@pytest.mark.chaos
async def test_steps_of_four_seconds_are_not_hung(ledger: Ledger) -> None:
    async with ledger.engine("runner.execute:sleep=4.0", stall_timeout_s=5.0) as engine:
        streams = asyncio.create_task(all_exact(engine, 8, count=4))
        while not streams.done():
            assert (await engine.health()).is_ready
            await asyncio.wait([streams], timeout=0.25)
        await streams
    assert not ledger.restarts


@pytest.mark.chaos
async def test_an_idle_core_is_never_taken_to_hang(ledger: Ledger) -> None:
    async with ledger.engine(**IMPATIENT) as engine:
        await all_exact(engine, 2)
        await asyncio.sleep(3.0)
        await all_exact(engine, 2)
    assert not ledger.restarts
