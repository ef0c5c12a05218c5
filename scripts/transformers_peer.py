#!/usr/bin/env python3
"""Do a benchmark's work with transformers' `generate`. Started by `benchmark.py --peer`.

Reads a `Job` as JSON on standard input, writes a `Result` as JSON on standard output. A process of
its own, so that torch, its threads and its memory are the peer's alone.
"""

import sys
import time
from typing import Any

import msgspec
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.utils import logging


class Job(msgspec.Struct, frozen=True):
    """What to do.

    Attributes:
        dtype: a name in torch, e.g. "bfloat16".
        batch_size: requests per call of `generate`, in order.
    """

    model: str
    dtype: str
    threads: int
    batch_size: int
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class Output(msgspec.Struct):
    """One request: its tokens, and when each came, in seconds since the start of the work."""

    token_ids: list[int]
    moments: list[float]


class Result(msgspec.Struct):
    """One output per request, in order, and how long all of them took."""

    outputs: list[Output]
    duration_s: float


class _Clock(StoppingCriteria):
    """Stops nothing; `generate` asks it after every step, which tells when that was."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(job: Job) -> Result:
    """Load the model, warm it up, and do the work batch by batch."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(job.threads)
    # Any: transformers' own annotations are not meant for strict checking.
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.generation_config.eos_token_id = None  # outputs have fixed lengths
    _generate(model, job, slice(0, 1), max_tokens=4)
    start = time.perf_counter()
    outputs = []
    for first in tqdm(range(0, len(job.prompts), job.batch_size), unit="batch", disable=None):
        outputs += _generate(model, job, slice(first, first + job.batch_size))
    duration = time.perf_counter() - start
    for output in outputs:
        output.moments = [moment - start for moment in output.moments]
    return Result(outputs, duration)


def _generate(model: Any, job: Job, batch: slice, max_tokens: int | None = None) -> list[Output]:
    """One static batch: it runs until its longest request is done, which is all that `generate`
    allows. Tokens beyond a shorter request's max_tokens are computed and not counted."""
    prompts, lengths = job.prompts[batch], job.max_tokens[batch]
    if max_tokens is not None:
        lengths = [max_tokens] * len(lengths)
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    clock = _Clock()
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(lengths),
            pad_token_id=0,
            **_sampling(job),
            stopping_criteria=[clock],
        )
    rows = generated[:, width:].tolist()
    return [
        Output(row[:length], clock.moments[:length])
        for row, length in zip(rows, lengths, strict=True)
    ]


def _sampling(job: Job) -> dict[str, Any]:
    if job.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": job.temperature,
        "top_p": job.top_p,
        "top_k": job.top_k,
    }


if __name__ == "__main__":
    result = run(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))
    sys.stdout.buffer.write(msgspec.json.encode(result))
