"""Runs a workload against an engine, and watches itself while it does."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from footplate.frontend.async_llm_engine import AsyncLLMEngine
from footplate.frontend.benchmark.summary import RequestRecord, spread
from footplate.frontend.benchmark.workload import WorkItem
from footplate.protocol.errors import FootplateError
from footplate.protocol.params import RequestOutputKind, SamplingParams

# A client that is later than this with its own timers cannot time anybody else.
MAX_CLIENT_LAG_MS = 5.0
_LAG_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run.

    Attributes:
        records: one per request, in the order of the work.
        duration_s: from the first send to the last token.
        loop_lag_ms: how late the client's event loop woke up: mean, median, std, p90, p99, max.
        client_cpu_share: of one core, used by the client process.
    """

    records: list[RequestRecord]
    duration_s: float
    loop_lag_ms: dict[str, float]
    client_cpu_share: float

    @property
    def client_was_bottleneck(self) -> bool:
        """Whether the latencies are at least partly the client's own."""
        return self.loop_lag_ms.get("p99", 0.0) > MAX_CLIENT_LAG_MS


async def run_work(
    engine: AsyncLLMEngine,
    work: Sequence[WorkItem],
    params: SamplingParams,
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> Run:
    """Send every request at its time, and return when all have ended.

    Arrivals are open-loop: a slow engine does not slow them down. Only `max_concurrency` makes
    requests wait, and they are not sent, nor timed, while they do.

    Args:
        params: for all requests; each gets its own `max_tokens`.
        on_done: called as each request ends.
    """
    records = [RequestRecord(len(item.prompt_token_ids)) for item in work]
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    params = msgspec.structs.replace(params, output_kind=RequestOutputKind.DELTA)

    async def send(index: int) -> None:
        item, record = work[index], records[index]
        own = msgspec.structs.replace(
            params, max_tokens=item.max_tokens, min_tokens=min(params.min_tokens, item.max_tokens)
        )
        async with gate:
            await _complete(engine, item, own, f"benchmark-{index}", record)
        on_done(record)

    async with _LoopLag() as lag:
        cpu_before, start = time.process_time(), time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, item in enumerate(work):
                records[index].planned = start + item.send_at_s
                if (delay := records[index].planned - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                tasks.create_task(send(index))
        now = time.perf_counter()
        end = max((record.moments[-1] for record in records if record.moments), default=now)
        cpu = time.process_time() - cpu_before
    duration = end - start
    return Run(records, duration, lag.spread_ms(), cpu / duration)


async def _complete(
    engine: AsyncLLMEngine,
    item: WorkItem,
    params: SamplingParams,
    request_id: str,
    record: RequestRecord,
) -> None:
    prompt = {"prompt_token_ids": item.prompt_token_ids}
    record.sent = time.perf_counter()
    try:
        async for output in engine.generate(prompt, params, request_id):
            completion = output.outputs[0]
            # The last output of a stream may hold a finish reason and no token.
            if completion.token_ids:
                record.moments.append(time.perf_counter())
                record.token_ids += completion.token_ids
    except FootplateError as error:
        record.error = str(error)


class _LoopLag:
    """Samples how late the event loop runs a timer."""

    def __init__(self) -> None:
        self._lags_ms: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._sample(), name="benchmark loop lag")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._task.cancel()

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self._lags_ms.append(1000 * max(0.0, time.perf_counter() - due))

    def spread_ms(self) -> dict[str, float]:
        """Empty for a run that was shorter than one sample."""
        ascending = sorted(self._lags_ms)
        return {**spread(ascending), "max": ascending[-1]} if ascending else {}
