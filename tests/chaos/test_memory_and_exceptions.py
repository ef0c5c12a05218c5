"""A step runs out of memory, raises, or has logits that are none (F11 to F14): that costs at most
the request that is the reason, and no core."""

import asyncio
from pathlib import Path

import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, SamplingParams
from footplate.protocol.errors import RequestFailedError

from .conftest import PATIENCE_S, Ledger, all_exact, exact
from .oracle import expected_tokens

MARK = 777
MARKED = [20, MARK, 21]


@pytest.mark.parametrize("action", ["raise", "oom"])
async def test_a_step_that_fails_once_is_run_again_and_nobody_notices(
    ledger: Ledger, action: str
) -> None:
    rules = f"runner.execute:{action}@5;runner.execute:{action}@30"
    async with ledger.engine(rules) as engine:
        await all_exact(engine, 24)
        assert (await engine.get_stats()).num_void_steps >= 1
    assert not ledger.restarts


@pytest.mark.parametrize(
    ("action", "words"), [("raise", "made its step fail"), ("oom", "fit into memory")]
)
async def test_a_request_that_makes_its_steps_fail_ends_alone(
    ledger: Ledger, action: str, words: str
) -> None:
    async with ledger.engine(f"runner.execute:{action}#{MARK}") as engine:
        others = asyncio.create_task(all_exact(engine, 16))
        with pytest.raises(RequestFailedError, match=words):
            await exact(engine, 1, prompt=MARKED)
        await others
    assert not ledger.restarts


@pytest.mark.parametrize("how", ["nan", "inf", "raise"])
async def test_a_request_with_impossible_logits_ends_alone_with_what_it_had(
    ledger: Ledger, how: str
) -> None:
    ledger.environment.syspath_prepend(Path(__file__).parent)
    ledger.environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    path = "broken_processor:Broken"
    async with ledger.engine(logits_processors=(path,)) as engine:
        others = asyncio.create_task(all_exact(engine, 16))
        params = SamplingParams(
            temperature=0, max_tokens=9, detokenize=False, logits_processors={path: {"how": how}}
        )
        got: list[int] = []
        with pytest.raises(RequestFailedError):
            async for output in engine.generate([20, 21], params):
                got = output.outputs[0].token_ids
        assert got == expected_tokens([20, 21], 3)
        await others
        # Its blocks are not in the prefix cache, so that nobody else meets what it computed.
        assert await tokens_of(engine, [20, 21]) == expected_tokens([20, 21], 9)
    assert not ledger.restarts


async def tokens_of(engine: AsyncLLMEngine, prompt: list[int]) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=9, detokenize=False)
    return [output async for output in engine.generate(prompt, params)][-1].outputs[0].token_ids


@pytest.mark.chaos
async def test_a_core_without_memory_loses_no_stream(ledger: Ledger) -> None:
    async with ledger.engine("runner.execute:sleep=0.004") as engine:
        core = psutil.Process(engine.process_id)
        # What it has, and next to nothing more; the core that takes its place is not limited.
        core.rlimit(psutil.RLIMIT_AS, (core.memory_info().vms + 2**20,) * 2)
        async with asyncio.timeout(2 * PATIENCE_S):
            await asyncio.gather(
                *(exact(engine, n, prompt=[20 + n] * 3000) for n in range(40)),
            )
