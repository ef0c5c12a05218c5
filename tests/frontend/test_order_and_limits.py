"""Who is served when, who is not, and by when: over a real engine core with the fake model.

Nothing here waits for time to pass: whatever has to be late is behind a request without an end.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestOutput, SamplingParams
from footplate.frontend.stream import RequestStream
from footplate.protocol.errors import InvalidParameterError, InvalidRequestError, QueueOverflowError

from .conftest import running_core
from .fake_model import expected_token_ids

PROMPT = [20, 21, 22]
PATIENCE_S = 20.0
FOREVER = SamplingParams(max_tokens=900_000, detokenize=False)
SHORT = SamplingParams(max_tokens=4, detokenize=False, seed=0)

ONE_AT_A_TIME = EngineArgs(
    model="fake",
    max_model_len=1_000_000,
    max_num_seqs=1,
    max_num_queued_reqs=3,
    max_unread_tokens=None,  # who occupies it is not read
)

pytestmark = pytest.mark.usefixtures("nothing_is_lost")


@pytest.fixture(scope="module")
def narrow_core() -> Iterator[str]:
    """One request at a time, and three that may wait."""
    with running_core(ONE_AT_A_TIME) as address:
        yield address


@asynccontextmanager
async def occupied(address: str) -> AsyncIterator[tuple[AsyncLLMEngine, RequestStream]]:
    """A client, and a request of its that runs until it is closed."""
    async with AsyncLLMEngine.connect(address) as engine, asyncio.timeout(PATIENCE_S):
        stream = await engine.add_request("forever", PROMPT, FOREVER)
        await anext(stream)
        yield engine, stream
        stream.close()


async def last_of(engine: AsyncLLMEngine, **options: Any) -> RequestOutput:
    async for output in engine.generate(PROMPT, SHORT, **options):
        last = output
    return last


# ---- deadlines


async def test_a_deadline_ends_a_running_request_with_what_there_is(
    engine: AsyncLLMEngine,
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for output in engine.generate(PROMPT, FOREVER, deadline_s=0.05):
            last = output
    [completion] = last.outputs
    assert (completion.finish_reason, completion.stop_reason) == ("deadline", None)
    expected = expected_token_ids(PROMPT, 20, seed=last.seed)
    assert completion.token_ids[:20] == expected, "what came before is right"


async def test_a_deadline_for_the_first_token_ends_a_waiting_request(narrow_core: str) -> None:
    async with occupied(narrow_core) as (engine, running):
        late = await last_of(engine, ttft_deadline_s=0.01)
        assert (late.outputs[0].finish_reason, late.outputs[0].token_ids) == ("deadline", [])
        assert not running.is_finished


async def test_a_deadline_for_the_first_token_means_nothing_behind_it(
    engine: AsyncLLMEngine,
) -> None:
    output = await last_of(engine, ttft_deadline_s=10.0, deadline_s=10.0)
    assert output.outputs[0].finish_reason == "length"


async def test_a_deadline_counts_from_the_arrival(narrow_core: str) -> None:
    async with occupied(narrow_core) as (engine, _):
        past = time.time() - 100.0
        late = await last_of(engine, arrival_time=past, deadline_s=99.0)
        assert late.outputs[0].finish_reason == "deadline"
        assert late.metrics.arrival_time == pytest.approx(past, abs=0.1)


@pytest.mark.parametrize("name", ["deadline_s", "ttft_deadline_s"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True])
async def test_deadlines_that_make_no_sense_are_refused(
    engine: AsyncLLMEngine, name: str, value: Any
) -> None:
    with pytest.raises(InvalidParameterError, match=f"{name}="):
        await last_of(engine, **{name: value})


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "now", True])
async def test_arrivals_that_make_no_sense_are_refused(engine: AsyncLLMEngine, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match="arrival_time="):
        await last_of(engine, arrival_time=value)


# ---- order


async def test_who_came_first_is_served_first_whenever_it_was_sent(narrow_core: str) -> None:
    async with occupied(narrow_core) as (engine, running):
        now, served = time.time(), []

        async def ask(age: float) -> None:
            await last_of(engine, arrival_time=now - age)
            served.append(age)

        async with asyncio.TaskGroup() as group:
            for age in (1.0, 3.0, 2.0):
                group.create_task(ask(age))
            while (await engine.get_stats()).num_waiting < 3:
                pass
            running.close()
        assert served == [3.0, 2.0, 1.0]


async def test_a_client_that_floods_the_engine_does_not_keep_another_one_waiting() -> None:
    with running_core(replace(ONE_AT_A_TIME, max_num_queued_reqs=None)) as address:
        async with occupied(address) as (flooding, running), AsyncLLMEngine.connect(address) as one:
            flood = [asyncio.create_task(last_of(flooding)) for _ in range(50)]
            while (await flooding.get_stats()).num_waiting < 50:
                pass
            other = asyncio.create_task(last_of(one))
            while (await one.get_stats()).num_waiting < 51:
                pass
            running.close()
            await other
            assert sum(task.done() for task in flood) < 25
            await asyncio.gather(*flood)


# ---- how much may wait


async def test_what_would_wait_behind_too_many_is_refused_and_the_others_are_served(
    narrow_core: str,
) -> None:
    async with occupied(narrow_core) as (engine, running):
        waiting = [await engine.add_request(None, PROMPT, SHORT) for _ in range(3)]
        with pytest.raises(
            QueueOverflowError, match=r"3 requests wait.*max_num_queued_reqs=3"
        ) as e:
            await engine.add_request(None, PROMPT, SHORT)
        assert 0 < e.value.retry_after_s <= 60
        running.close()
        for stream in waiting:
            assert [output async for output in stream][-1].finished
        await last_of(engine)


async def test_n_requests_wait_as_n(narrow_core: str) -> None:
    async with occupied(narrow_core) as (engine, _):

        def of(n: int) -> SamplingParams:
            return SamplingParams(n=n, max_tokens=4, detokenize=False)

        stream = await engine.add_request(None, PROMPT, of(2))
        with pytest.raises(QueueOverflowError, match="2 requests wait, 2 more"):
            await engine.add_request(None, PROMPT, of(2))
        with pytest.raises(InvalidRequestError, match="4 requests can never wait together"):
            await engine.add_request(None, PROMPT, of(4))
        stream.close()


async def test_the_core_counts_what_all_clients_let_wait(narrow_core: str) -> None:
    async with occupied(narrow_core) as (first, _), AsyncLLMEngine.connect(narrow_core) as second:
        streams = [await first.add_request(None, PROMPT, SHORT) for _ in range(3)]
        await first.get_stats()
        with pytest.raises(QueueOverflowError, match=r"3 .*max_num_queued_reqs.*try again in"):
            await last_of(second)
        for stream in streams:
            stream.close()


async def test_tokens_of_waiting_prompts_are_limited_too() -> None:
    with running_core(replace(ONE_AT_A_TIME, max_num_queued_tokens=7)) as address:
        async with occupied(address) as (engine, _):
            waiting = [await engine.add_request(None, PROMPT, SHORT) for _ in range(2)]
            with pytest.raises(QueueOverflowError, match=r"6 tokens wait, 3 more.*tokens=7"):
                await engine.add_request(None, PROMPT, SHORT)
            for stream in waiting:
                stream.close()
