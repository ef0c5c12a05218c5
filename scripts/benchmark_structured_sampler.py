#!/usr/bin/env python3
"""Measure what a JSON schema adds to the sampling of a step, in CPU time: of the thread that runs
the step, and of the thread that makes masks beside the forward pass. No model is run, and a busy
machine changes little.

scripts/benchmark_structured_sampler.py                        # 32 rows, 32,000 synthetic tokens
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmark_structured import ORDER, synthetic_tokenizer
from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels
from footplate.backend.request import Request
from footplate.backend.runner.sampler import Sampler
from footplate.backend.structured.interface import CompiledGrammar
from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.structured import GrammarTranslator
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import TokenParams

# So long that no output comes to its end.
SCHEMA = {"type": "array", "items": ORDER, "minItems": 500, "$defs": ORDER["$defs"]}


def sample_ms(
    sampler: Sampler, logits: torch.Tensor, grammar: CompiledGrammar | None, num_steps: int
) -> tuple[float, float]:
    """Milliseconds of a step's sampling, median: of this thread, and of all others.

    Args:
        logits: float32 [rows, vocab]; every step sees them shifted.
    """
    requests = [
        Request(
            key=row,
            client=b"",
            handle=row,
            token_ids=[0],
            num_prompt_tokens=1,
            params=TokenParams(1.0, 1.0, 0, 0.0, row, 10**6, 0, ()),
            grammar=grammar,
        )
        for row in range(len(logits))
    ]
    own, others = [], []
    for step in range(num_steps):
        rows = logits.roll(97 * step, 1)
        total, since = time.process_time(), time.thread_time()
        sampler.prepare(requests, logits.shape[1])
        result = sampler.sample(rows, requests)
        own.append(1e3 * (time.thread_time() - since))
        others.append(1e3 * (time.process_time() - total) - own[-1])
        assert not result.errors
        for request, token_id in zip(requests, result.token_ids, strict=True):
            request.token_ids.append(token_id)
    sampler.forget(request.key for request in requests)
    return statistics.median(own), statistics.median(others)


def main() -> None:
    """With a schema and without, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        synthetic_tokenizer(Path(folder), args.vocab)
        engine = LlguidanceEngine(folder, args.vocab, ())
        grammar = GrammarTranslator().translate(StructuredOutputsParams(json=SCHEMA))
        compiled = engine.compile(grammar)
    library = build.load(build.cache_folder(os.environ))
    sampler = Sampler(None if library is None else Kernels(library))
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(args.rows, args.vocab, generator=generator)
    for _ in range(args.rounds):
        for name, wanted in (("without", None), ("with a schema", compiled)):
            own, others = sample_ms(sampler, logits, wanted, args.steps)
            print(f"{name:14} step's thread {own:6.2f} ms, masks' thread {others:6.2f} ms")


if __name__ == "__main__":
    main()
