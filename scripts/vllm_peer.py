#!/usr/bin/env python3
"""A peer: vLLM's AsyncLLM, on whatever device that vLLM was built for.

Options: max_num_batched_tokens (of a step). On CPUs it takes VLLM_CPU_KVCACHE_SPACE (GiB) from the
environment, 4 if not given.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter
from typing import Any

from peer import Engine, Job, Output, Work, main


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Start an engine without tokenizer and prefix cache, and with a slot for every request."""
    # vLLM leaves a core to its client unless it is told which ones to take.
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    # Not before its environment variables are set.
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=job.model,
        dtype=job.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(job.warmup.lengths + job.work.lengths),
        max_num_seqs=len(job.work.prompts),
        max_num_batched_tokens=job.options["max_num_batched_tokens"],
        generation_config="vllm",
        disable_log_stats=True,
    )

    async def open_engine() -> Any:
        return AsyncLLM.from_engine_args(args)

    ids = count()
    with asyncio.Runner() as loop:
        engine = loop.run(open_engine())

        def generate(work: Work) -> list[Output]:
            return loop.run(_generate_all(engine, work, ids))

        try:
            yield Engine(f"vllm {vllm.__version__}", generate)
        finally:
            engine.shutdown()


async def _generate_all(engine: Any, work: Work, ids: "count[int]") -> list[Output]:
    return await asyncio.gather(
        *(_generate(engine, prompt, n, f"request-{next(ids)}") for prompt, n in work.requests)
    )


async def _generate(engine: Any, prompt: list[int], max_tokens: int, request_id: str) -> Output:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    output = Output()
    async for delta in engine.generate({"prompt_token_ids": prompt}, params, request_id):
        if token_ids := delta.outputs[0].token_ids:
            output.moments.append(perf_counter())
            output.token_ids += token_ids
    return output


if __name__ == "__main__":
    main(start)
