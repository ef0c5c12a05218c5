"""The driver sends each request at its time, and times what comes back."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from footplate.frontend import AsyncLLMEngine, SamplingParams
from footplate.frontend.benchmark.driver import run_work
from footplate.frontend.benchmark.workload import WorkItem
from footplate.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from footplate.protocol.errors import RequestFailedError


class ScriptedEngine:
    """Answers with max_tokens tokens, one after each turn of the event loop. Fails prompts that
    begin with 13. Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []
        self.num_running = self.most_running = 0

    async def generate(
        self, prompt: dict[str, list[int]], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append(params)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        token_ids = prompt["prompt_token_ids"]
        assert params.max_tokens is not None
        for token in [*range(params.max_tokens), None]:
            await asyncio.sleep(0)
            if token_ids[0] == 13:
                raise RequestFailedError("unlucky")
            new = [] if token is None else [token]  # the last output only ends the stream
            completion = CompletionOutput(0, "", new, None if new else "length")
            metrics = RequestMetrics(0.0, 0.0)
            yield RequestOutput(request_id, None, token_ids, [completion], not new, 0, metrics)
        self.num_running -= 1


async def run(work: list[WorkItem], **options: Any) -> tuple[Any, ScriptedEngine]:
    engine = ScriptedEngine()
    params = options.pop("params", SamplingParams())
    return await run_work(cast(AsyncLLMEngine, engine), work, params, **options), engine


async def test_every_token_of_every_request_is_recorded() -> None:
    outcome, engine = await run([WorkItem([1, 2], 3, 0.0), WorkItem([3], 1, 0.0)])
    assert [record.token_ids for record in outcome.records] == [[0, 1, 2], [0]]
    assert [len(record.moments) for record in outcome.records] == [3, 1]
    assert [record.num_prompt_tokens for record in outcome.records] == [2, 1]
    assert [params.max_tokens for params in engine.asked] == [3, 1]


async def test_moments_ascend_from_sending_to_the_end_of_the_run() -> None:
    before = time.perf_counter()
    outcome, _ = await run([WorkItem([1], 4, 0.0)])
    (record,) = outcome.records
    assert before <= record.planned <= record.sent < record.moments[0]
    assert record.moments == sorted(record.moments)
    assert outcome.duration_s >= record.e2el_s


async def test_requests_are_sent_when_they_are_due_and_not_before() -> None:
    outcome, _ = await run([WorkItem([1], 1, 0.0), WorkItem([1], 1, 0.03), WorkItem([1], 1, 0.03)])
    first, second, third = outcome.records
    assert second.planned - first.planned >= 0.0299
    assert second.sent >= second.planned
    assert third.sent >= third.planned


async def test_at_most_max_concurrency_requests_are_in_flight() -> None:
    work = [WorkItem([1], 5, 0.0)] * 10
    _, unlimited = await run(work)
    _, limited = await run(work, max_concurrency=3)
    assert unlimited.most_running == 10
    assert limited.most_running == 3


async def test_a_failed_request_is_recorded_and_the_others_go_on() -> None:
    done: list[str] = []
    outcome, _ = await run(
        [WorkItem([13], 2, 0.0), WorkItem([1], 2, 0.0)],
        on_done=lambda record: done.append(record.error),
    )
    assert [record.error for record in outcome.records] == ["unlucky", ""]
    assert sorted(done) == ["", "unlucky"]


async def test_min_tokens_never_exceeds_a_requests_own_length() -> None:
    params = SamplingParams(max_tokens=8, min_tokens=8)
    _, engine = await run([WorkItem([1], 2, 0.0)], params=params)
    assert engine.asked[0].min_tokens == 2
