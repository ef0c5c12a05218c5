#!/usr/bin/env python3
"""A peer: transformers' `generate`.

Options: batch_size (requests per call of `generate`, in order), temperature, top_p, top_k.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria
from transformers.utils import logging

from peer import Engine, Job, Output, Work, main


class _Clock(StoppingCriteria):
    """Stops nothing; `generate` asks it after every step, which tells when that was."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Load the model; work is done batch by batch."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(job.threads)
    # Any: transformers' own annotations are not meant for strict checking.
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.generation_config.eos_token_id = None  # outputs have fixed lengths
    sampling = _sampling(job.options)

    def generate(work: Work) -> list[Output]:
        size = job.options.get("batch_size", len(work.prompts))
        outputs = []
        for first in range(0, len(work.prompts), size):
            batch = slice(first, first + size)
            part = Work(work.prompts[batch], work.max_tokens[batch])
            outputs += _generate(model, part, sampling)
        return outputs

    yield Engine(f"transformers {transformers.__version__}", generate)


def _generate(model: Any, batch: Work, sampling: dict[str, Any]) -> list[Output]:
    """One static batch: it runs until its longest request is done, which is all that `generate`
    allows. Tokens beyond a shorter request's max_tokens are computed and not counted."""
    width = max(map(len, batch.prompts))
    padding = [width - len(prompt) for prompt in batch.prompts]
    ids = [[0] * pad + prompt for pad, prompt in zip(padding, batch.prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    clock = _Clock()
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max(batch.max_tokens),
            pad_token_id=0,
            **sampling,
            stopping_criteria=[clock],
        )
    rows = generated[:, width:].tolist()
    return [
        Output(row[:length], clock.moments[:length])
        for row, length in zip(rows, batch.max_tokens, strict=True)
    ]


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    if not options.get("temperature"):
        return {"do_sample": False}
    return {
        "do_sample": True,
        **{name: options[name] for name in ("temperature", "top_p", "top_k")},
    }


if __name__ == "__main__":
    main(start)
