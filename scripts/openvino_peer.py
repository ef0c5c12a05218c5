#!/usr/bin/env python3
"""A peer: OpenVINO GenAI's continuous batching on the CPU.

Options: ir (folder of the model, see openvino_convert.py), max_num_batched_tokens (of a step),
properties (of the device, by name; they replace those set here).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from time import perf_counter

import numpy
import openvino
import openvino_genai
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from peer import Engine, Job, Output, Work, main

PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
TOKENS_PER_BLOCK = 32


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Compile the model; the KV cache holds all requests at once, and nothing but requests."""
    scheduler = SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = len(job.work.prompts)
    scheduler.max_num_batched_tokens = job.options["max_num_batched_tokens"]
    scheduler.num_kv_blocks = max(_num_blocks(job.warmup), _num_blocks(job.work))
    properties = {
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[job.dtype],
        **job.options.get("properties", {}),
    }
    pipeline = ContinuousBatchingPipeline(job.options["ir"], scheduler, "CPU", properties)
    ids = count()

    def generate(work: Work) -> list[Output]:
        handles = [
            pipeline.add_request(next(ids), openvino.Tensor(numpy.array([prompt])), _greedy(n))
            for prompt, n in work.requests
        ]
        outputs = [Output() for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = perf_counter()
            for handle, output in zip(handles, outputs, strict=True):
                while handle.can_read():
                    (generated,) = handle.read().values()
                    output.token_ids += generated.generated_ids
                    output.moments.append(now)
        return outputs

    yield Engine(f"openvino-genai {openvino_genai.__version__}", generate)


def _greedy(max_tokens: int) -> GenerationConfig:
    # A model without such a token, or a tokenizer to know it, would be given an invalid one: any
    # will do, as it is ignored.
    return GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, ignore_eos=True, eos_token_id=0
    )


def _num_blocks(work: Work) -> int:
    # One more than it needs for each request: the token after the last is given a place too.
    return sum(length // TOKENS_PER_BLOCK + 2 for length in work.lengths)


if __name__ == "__main__":
    main(start)
