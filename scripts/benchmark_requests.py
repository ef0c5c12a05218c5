#!/usr/bin/env python3
"""Measure what requests ask for beside a token: what it adds to choosing the tokens of a step.

scripts/benchmark_requests.py                    # vocabularies of 32,000 and 151,936
scripts/benchmark_requests.py --vocab 128256 --rows 8
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmark_sampler import peaked
from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels
from footplate.backend.request import Request
from footplate.backend.runner.sampler import Sampler
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    TokenParams,
)

NUM_OUTPUT_TOKENS = 500  # there already when the first step is timed
NUM_PROMPT_TOKENS = 32
NUM_SCORED = 512  # prompt tokens
STOP_ID = 2


class RandomGrammar:
    """Allows half of all tokens, others at each step. Grammar and matcher in one."""

    def __init__(self, vocab: int) -> None:
        size = (vocab + 31) // 32
        self._mask = np.random.default_rng(0).integers(-(2**31), 2**31, size, dtype=np.int32)

    def start(self) -> "RandomGrammar":
        """A matcher."""
        return self

    def advance(self, token_ids: Sequence[int]) -> bool:
        """Any token will do, and there is no end."""
        return False

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """A copy: making masks is not what is measured."""
        mask[:] = self._mask


@dataclass(frozen=True)
class Case:
    """What all requests of a step ask for."""

    sampling: dict[str, Any] = field(default_factory=dict)
    adjustments: dict[str, Any] = field(default_factory=dict)
    logprobs: dict[str, Any] = field(default_factory=dict)
    has_grammar: bool = False


GREEDY = {"temperature": 0.0}
CUT = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}


def cases(vocab: int, rng: random.Random) -> dict[str, Case]:
    """By name. What is no sampling of its own is greedy, which costs the least."""
    ids = rng.sample(range(vocab), 1300)
    words = tuple(tuple(rng.sample(range(vocab), 1 + i % 3)) for i in range(50))
    raw, processed = LogprobsMode.RAW_LOGPROBS, LogprobsMode.PROCESSED_LOGPROBS
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    return {
        "plain, greedy": Case(GREEDY),
        "plain, sampled": Case(CUT),
        "presence penalty": Case(GREEDY, {"presence_penalty": 0.5}),
        "all penalties": Case(GREEDY, penalties),
        "logit_bias, 300 entries": Case(GREEDY, {"logit_bias": dict.fromkeys(ids[:300], 1.5)}),
        "allowed_token_ids, 1000": Case(GREEDY, {"allowed_token_ids": tuple(ids[300:])}),
        "bad_words, 50": Case(GREEDY, {"bad_words": words}),
        "min_tokens": Case(GREEDY | {"min_tokens": 10**6}),
        "logprobs 0": Case(GREEDY, {}, {"num_logprobs": 0, "mode": raw}),
        "logprobs 5": Case(GREEDY, {}, {"num_logprobs": 5, "mode": raw}),
        "logprobs 20": Case(GREEDY, {}, {"num_logprobs": 20, "mode": raw}),
        "logprobs 5, processed": Case(GREEDY, {}, {"num_logprobs": 5, "mode": processed}),
        "sampled, logprobs 5": Case(CUT, {}, {"num_logprobs": 5, "mode": raw}),
        "sampled, logprobs 5, processed": Case(CUT, {}, {"num_logprobs": 5, "mode": processed}),
        "grammar": Case(GREEDY, has_grammar=True),
    }


def make_request(key: int, case: Case, vocab: int, num_tokens: int) -> Request:
    """A request that has produced some output."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0}
    params = TokenParams(
        **sampling | case.sampling,
        seed=key,
        max_tokens=2**31 - 1,
        stop_token_ids=(STOP_ID,),
        adjustments=LogitAdjustments(**case.adjustments) if case.adjustments else None,
        logprobs=LogprobsRequest(**case.logprobs) if case.logprobs else None,
    )
    token_ids = [random.Random(key + i).randrange(vocab) for i in range(num_tokens)]
    grammar = RandomGrammar(vocab) if case.has_grammar else None
    return Request(key, b"", key, token_ids, NUM_PROMPT_TOKENS, params, grammar=grammar)


def median_ms(run: Callable[[], object], prepare: Callable[[], object], rounds: int) -> float:
    """Milliseconds that `run` takes of this thread's CPU time, behind `prepare`: other processes
    do not count, however busy."""
    seconds = []
    for _ in range(rounds + 2):
        prepare()
        since = time.thread_time()
        run()
        seconds.append(time.thread_time() - since)
    return 1e3 * statistics.median(seconds[2:])


def measure_step(sampler: Sampler, case: Case, logits: torch.Tensor, rounds: int) -> float:
    """Milliseconds from the logits of a step to its result."""
    num_rows, vocab = logits.shape
    num_tokens = NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS
    requests = [make_request(key, case, vocab, num_tokens) for key in range(num_rows)]
    scratch = torch.empty_like(logits)

    def prepare() -> None:
        # As with a forward pass: masks are made meanwhile.
        sampler.prepare(requests, vocab)
        scratch.copy_(logits)

    def run() -> None:
        result = sampler.sample(scratch, requests)
        for request, token_id in zip(requests, result.token_ids, strict=True):
            request.token_ids.append(token_id)

    try:
        return median_ms(run, prepare, rounds)
    finally:
        sampler.forget(request.key for request in requests)


def measure_prompt(sampler: Sampler, num_logprobs: int, logits: torch.Tensor, rounds: int) -> float:
    """Milliseconds to score the tokens of one prompt."""
    wanted = {"num_prompt_logprobs": num_logprobs}
    request = make_request(0, Case(logprobs=wanted), logits.shape[1], NUM_SCORED + 1)
    positions = range(1, NUM_SCORED + 1)
    return median_ms(
        lambda: sampler.score_prompt(logits, request, positions), lambda: None, max(3, rounds // 4)
    )


def main() -> None:
    """All cases at all sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--torch", action="store_true", help="leave our own kernels out")
    args = parser.parse_args()
    kernels = None
    if not args.torch and (library := build.load(build.cache_folder(os.environ))):
        kernels = Kernels(library)
    torch.set_num_threads(1)
    print(
        f"{args.rows} rows, {kernels.instruction_set if kernels else 'torch'}, "
        f"1 thread, median of {args.rounds}, ms; more than plain ones"
    )
    torch.manual_seed(0)
    sampler = Sampler(kernels)
    columns: list[dict[str, str]] = []
    for vocab in args.vocab:
        logits, column = peaked(args.rows, vocab), {}
        plain: dict[bool, float] = {}
        for name, case in cases(vocab, random.Random(0)).items():
            ms = measure_step(sampler, case, logits, args.rounds)
            is_greedy = case.sampling["temperature"] == 0
            plain.setdefault(is_greedy, ms)
            column[name] = (
                f"{ms:.2f}" if name.startswith("plain") else f"{ms - plain[is_greedy]:+.2f}"
            )
        rows = logits[torch.arange(NUM_SCORED) % args.rows]
        for count in (0, 5):
            ms = measure_prompt(sampler, count, rows, args.rounds)
            column[f"prompt_logprobs {count}, {NUM_SCORED} tokens"] = f"{ms:.1f}"
        columns.append(column)
    print(f"{'vocabulary':36}" + "".join(f"{vocab:10}" for vocab in args.vocab))
    for name in columns[0]:
        print(f"{name:36}" + "".join(f"{column[name]:>10}" for column in columns))


if __name__ == "__main__":
    main()
