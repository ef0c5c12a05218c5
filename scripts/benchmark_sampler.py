#!/usr/bin/env python3
"""Measure how long choosing tokens takes, by parameters and number of threads.

scripts/benchmark_sampler.py                    # our own kernels
scripts/benchmark_sampler.py --torch            # what runs where those do not exist
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch

from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels
from footplate.backend.request import Request
from footplate.backend.runner.sampler import Sampler
from footplate.protocol.token_params import TokenParams

LIMITS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_k 20000": {"top_k": 20_000},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "all three": {"top_k": 20_000, "top_p": 0.95, "min_p": 1e-6},
}


def request(seed: int, **limits: Any) -> Request:
    """A request about to sample its first token."""
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | limits
    params = TokenParams(**values, seed=seed, max_tokens=1, min_tokens=0, stop_token_ids=())
    return Request(key=0, client=b"", handle=0, token_ids=[0], num_prompt_tokens=1, params=params)


def peaked(num_rows: int, vocab: int) -> torch.Tensor:
    """Like a trained model's: about 200 tokens hold 95 % of the probability."""
    by_rank = -1.5 * torch.arange(1, vocab + 1).log()
    return torch.stack([by_rank[torch.randperm(vocab)] for _ in range(num_rows)])


def median_ms(
    sampler: Sampler, logits: torch.Tensor, requests: list[Request], rounds: int
) -> float:
    """Milliseconds for one batch; the sampler may overwrite its logits."""
    scratch, seconds = torch.empty_like(logits), []
    for _ in range(rounds + 2):
        scratch.copy_(logits)
        since = time.perf_counter()
        sampler.sample(scratch, requests)
        seconds.append(time.perf_counter() - since)
    return 1e3 * statistics.median(seconds[2:])


def main() -> None:
    """All parameters on rows of all kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--torch", action="store_true", help="leave our own kernels out")
    args = parser.parse_args()
    kernels = None
    if not args.torch and (library := build.load(build.cache_folder(os.environ))):
        kernels = Kernels(library)
    sampler = Sampler(kernels)
    torch.manual_seed(0)
    shape = (args.rows, args.vocab)
    kinds = {
        "peaked": peaked(*shape),
        "flat": torch.randn(shape),
        "equal": torch.zeros(shape),
    }
    print(
        f"{args.rows} rows of {args.vocab}, {kernels.instruction_set if kernels else 'torch'}, "
        f"median of {args.rounds}, ms, threads: {args.threads}"
    )
    batches = {
        name: [request(row, **limits) for row in range(args.rows)]
        for name, limits in LIMITS.items()
    }
    mixed = list(LIMITS.values())
    batches["mixed"] = [request(row, **mixed[row % len(mixed)]) for row in range(args.rows)]
    for name, requests in batches.items():
        for kind, logits in kinds.items():
            times = []
            for threads in args.threads:
                torch.set_num_threads(threads)
                times.append(median_ms(sampler, logits, requests, args.rounds))
            print(f"{name:22}{kind:8}" + "".join(f"{ms:9.2f}" for ms in times), flush=True)


if __name__ == "__main__":
    main()
