"""The cut in numpy against the sampler's own, and the rows that are made with it."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from footplate.backend.logits.processed import find_cutoff, process_row
from footplate.backend.runner import cutoff

from .builders import make_params

NOT = -math.inf


@pytest.mark.parametrize("vocab", [1, 2, 17, 500, 5000])
def test_it_cuts_where_the_sampler_cuts(vocab: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        scale = rng.choice([0.0, 1e-6, 1.0, 5.0])
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale
        if rng.random() < 0.3:
            logits = (logits * 2).round() / 2
        probs = torch.softmax(logits, -1)
        params = make_params(
            min_p=rng.choice([0.0, 1e-30, 1.0, rng.random() ** 6]),
            top_k=rng.choice([0, 1, 2, vocab, 2**31 - 1, rng.randint(1, vocab)]),
            top_p=rng.choice([1.0, 1e-300, 1 - 2**-53, rng.random() or 0.5, 0.95]),
        )
        expected = cutoff.find_cutoff(
            probs[None],
            torch.tensor([[params.min_p]], dtype=torch.float32),
            torch.tensor([[params.top_k]]),
            torch.tensor([[params.top_p]], dtype=torch.float64),
        )
        assert find_cutoff(probs.numpy(), params) == expected.item(), f"seed {seed}: {params}"


def process(row: list[float], chosen: int | None = None, **fields: Any) -> list[float]:
    params = make_params(**{"temperature": 1.0, **fields})
    return list(map(float, process_row(np.array(row, np.float32), params, chosen)))


def test_greedy_rows_stay_as_they_are() -> None:
    row = [1.0, 3.0, NOT]
    assert process(row, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5) == row


def test_temperature_divides() -> None:
    assert process([1.0, 3.0, NOT], temperature=0.5) == [2.0, 6.0, NOT]
    assert process([1.0, 3.0], temperature=1e-9) == [100.0, 300.0]


def test_what_is_cut_is_impossible_and_ties_stay() -> None:
    assert process([1.0, 3.0, 2.0, 2.0], top_k=2) == [NOT, 3.0, 2.0, 2.0]
    assert process([0.0, 0.0, 0.0, -9.0], top_p=0.1) == [0.0, 0.0, 0.0, NOT]
    assert process([0.0, -1.0, -9.0], min_p=0.3) == [0.0, -1.0, NOT]


def test_what_was_drawn_was_not_cut() -> None:
    assert process([1.0, 3.0, 2.0], 2, top_k=1) == [NOT, 3.0, 2.0]


@pytest.mark.parametrize("row", [[NOT, NOT], [math.nan, 0.0], [math.inf, 0.0]])
def test_a_row_that_is_no_distribution_is_not_cut(row: list[float]) -> None:
    np.testing.assert_array_equal(process(row, top_k=1, top_p=0.5), row)
