#!/usr/bin/env python3
"""A peer: Footplate itself, client and engine core.

Options: engine_args (the fields of EngineArgs).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import uvloop

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams
from footplate.frontend.benchmark.driver import run_work
from footplate.frontend.benchmark.workload import WorkItem
from peer import Engine, Job, Output, Work, main

GREEDY = SamplingParams(temperature=0, ignore_eos=True, detokenize=False)


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Start a core of one's own."""
    engine = AsyncLLMEngine.from_engine_args(EngineArgs(**job.options["engine_args"]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:

        def generate(work: Work) -> list[Output]:
            items = [WorkItem(*request, 0.0) for request in work.requests]
            done = loop.run(run_work(engine, items, GREEDY))
            for record in done.records:
                if record.error:
                    raise RuntimeError(record.error)
            return [Output(record.token_ids, record.moments) for record in done.records]

        loop.run(engine.start())
        try:
            yield Engine(f"footplate {metadata.version('footplate-llm')}", generate)
        finally:
            engine.shutdown()


if __name__ == "__main__":
    main(start)
