"""The core dies (F1 to F4, F12): wherever it is at that moment, streams go on where they were."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from footplate.frontend import AsyncLLMEngine
from footplate.protocol.errors import EngineDeadError, RequestFailedError

from .conftest import PATIENCE_S, Ledger, all_exact, exact

SLOW_STEPS = "runner.execute:sleep=0.004"
POISON = 777  # a token of the prompt that ends the core, by a rule
SCRIPTS = Path(__file__).parents[2] / "scripts"


async def kill(engine: AsyncLLMEngine) -> None:
    """Kill the core, and wait until another serves."""
    core = engine.process_id
    assert core is not None
    os.kill(core, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while not engine.is_running or engine.process_id == core:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_requests_that_wait_are_served_by_the_next_core(ledger: Ledger) -> None:
    async with ledger.engine(SLOW_STEPS, max_num_seqs=4, max_num_batched_tokens=64) as engine:
        streams = asyncio.create_task(all_exact(engine, 200, count=5))
        await asyncio.sleep(0.05)
        assert (await engine.get_stats()).num_waiting > 100
        await kill(engine)
        await streams
    [restart] = ledger.restarts
    assert "SIGKILL" in restart.cause and "memory" in restart.cause


async def test_a_prompt_that_is_half_computed_is_computed_again(ledger: Ledger) -> None:
    # Two chunks of six have been computed, and no token has come.
    async with ledger.engine("runner.execute:kill@3", max_num_batched_tokens=512) as engine:
        async with asyncio.timeout(PATIENCE_S):
            await exact(engine, 1, prompt=[20 + n % 2000 for n in range(3000)])
    assert len(ledger.restarts) == 1


@pytest.mark.parametrize(
    "rule",
    [
        "core.step:segfault@9",
        "runner.execute:exit=3@9",
        pytest.param("core.outputs:kill@9", marks=pytest.mark.chaos),
        pytest.param("core.outputs:raise@9", marks=pytest.mark.chaos),
        pytest.param("core.sent:exit=0@9", marks=pytest.mark.chaos),
        pytest.param("core.sent:raise@9", marks=pytest.mark.chaos),
        pytest.param("inbox.receive:kill@5", marks=pytest.mark.chaos),
        pytest.param("inbox.receive:raise@5", marks=pytest.mark.chaos),
        pytest.param("core.outputs:oom@9", marks=pytest.mark.chaos),
    ],
)
async def test_a_core_may_die_anywhere_in_its_loop(ledger: Ledger, rule: str) -> None:
    async with ledger.engine(rule) as engine:
        await all_exact(engine, 24)
    assert len(ledger.restarts) == 1


@pytest.mark.chaos
@pytest.mark.parametrize("place", ["start.begun", "start.bound", "start.loaded"])
async def test_the_next_core_may_die_while_it_starts(ledger: Ledger, place: str) -> None:
    async with ledger.engine(SLOW_STEPS) as engine:
        streams = asyncio.create_task(all_exact(engine, 24))
        await asyncio.sleep(0.1)
        ledger.fail(f"{place}:kill")
        core = engine.process_id
        assert core is not None
        os.kill(core, signal.SIGKILL)
        await asyncio.sleep(0.6)
        ledger.fail("")
        await streams
    assert len(ledger.restarts) == 1


@pytest.mark.chaos
async def test_twenty_deaths_at_random_moments_change_no_stream(ledger: Ledger) -> None:
    dice = Random(5)
    async with ledger.engine(SLOW_STEPS) as engine:
        for _ in range(4):
            streams = asyncio.create_task(all_exact(engine, 64, count=400))
            for _ in range(5):
                await asyncio.sleep(dice.uniform(0.02, 0.2))
                await kill(engine)
            await streams
    assert len(ledger.restarts) == 20


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The load of scripts/chaos.py: every kind of request."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import chaos_load

    yield chaos_load
    sys.modules.pop("chaos_load", None)


@pytest.mark.chaos
async def test_a_death_changes_no_token_text_or_logprob_of_any_kind_of_request(
    ledger: Ledger, scripts: ModuleType
) -> None:
    args = {"scheduling_policy": "priority", "max_model_len": 1024}
    load = scripts.Load(scripts.make_templates(56, 1, 2048))
    async with ledger.engine(SLOW_STEPS, **args) as engine:
        await load.learn(engine, 32)
        load.begin(engine, 32)
        for _ in range(6):
            await load.all_go_on(PATIENCE_S)
            await kill(engine)
        await load.end()
        await load.check_rest(engine, 32)
    assert load.damage == scripts.Damage() and not load.failures, load.differences[:1]
    assert load.num_streams > 32


# ---- who is to blame


async def test_a_request_that_ends_cores_ends_alone_and_the_others_are_exact(
    ledger: Ledger,
) -> None:
    async with ledger.engine(f"runner.execute:segfault#{POISON}") as engine:
        ledger.fail(f"runner.execute:segfault#{POISON}")  # the next core has the same fault
        others = asyncio.create_task(all_exact(engine, 12))
        with pytest.raises(RequestFailedError, match="took part alone"):
            await exact(engine, 1, prompt=[20, POISON, 21])
        await others
    assert len(ledger.restarts) == 2


@pytest.mark.chaos
async def test_two_requests_that_end_cores_are_both_found(ledger: Ledger) -> None:
    rule = f"runner.execute:exit=9#{POISON}"
    async with ledger.engine(rule) as engine:
        ledger.fail(rule)
        poisoned = [
            asyncio.create_task(exact(engine, number, prompt=[20 + number, POISON]))
            for number in range(2)
        ]
        await all_exact(engine, 12)
        for task in poisoned:
            with pytest.raises(RequestFailedError):
                await task
    assert 2 <= len(ledger.restarts) <= 4


async def test_cores_that_never_start_end_the_engine_with_the_cause_of_the_last(
    ledger: Ledger,
) -> None:
    ledger.fail(SLOW_STEPS)
    from footplate.frontend import EngineArgs  # the ledger's engine would ask a dead core

    args = EngineArgs(model="fake", log_level="ERROR", max_restarts=1)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        ledger.fail("start.loaded:raise")
        stream = asyncio.create_task(exact(engine, 1))
        await asyncio.sleep(0.05)
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="a fail point"):
            async with asyncio.timeout(PATIENCE_S):
                await stream
