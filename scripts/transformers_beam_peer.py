#!/usr/bin/env python3
"""A peer: transformers' beam search, one prompt after the other.

Options: beam_width, length_penalty. A prompt stands beam_width times in the work, once for each of
its outputs, which are returned best first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peer import Engine, Job, Output, Work, main


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Load the model."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(job.threads)
    # Any: transformers' own annotations are not meant for strict checking.
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.generation_config.eos_token_id = None  # outputs have fixed lengths
    width = job.options["beam_width"]

    def generate(work: Work) -> list[Output]:
        outputs = []
        for prompt, max_tokens in work.requests[::width]:
            outputs += search(model, prompt, max_tokens, width, job.options["length_penalty"])
        return outputs

    yield Engine(f"transformers {transformers.__version__}", generate)


def search(
    model: Any, prompt: list[int], max_tokens: int, beam_width: int, length_penalty: float
) -> list[Output]:
    """All outputs of one prompt."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            num_beams=beam_width,
            num_return_sequences=beam_width,
            length_penalty=length_penalty,
            do_sample=False,
            pad_token_id=0,
        )
    return [Output(row) for row in generated[:, len(prompt) :].tolist()]


if __name__ == "__main__":
    main(start)
