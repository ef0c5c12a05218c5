"""The normaliser of logprobs against float64, and its bits wherever a row lies."""

import math

import numpy as np
import pytest

from footplate.backend.kernels.ops import Kernels
from footplate.backend.logits.logprobs import log_sum_exp

# Chunks of the kernel have 512 numbers, vectors 16.
VOCABS = [1, 2, 15, 16, 17, 511, 512, 513, 5003, 151_936]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("scale", [1e-3, 4.0, 500.0])
def test_it_is_the_logarithm_of_the_sum(kernels: Kernels, vocab: int, scale: float) -> None:
    row = (np.random.default_rng(vocab).normal(size=vocab) * scale).astype(np.float32)
    row[:: 1 + vocab // 3] = row.max()
    wide = row.astype(np.float64)
    exact = wide.max() + math.log(np.exp(wide - wide.max()).sum())
    assert kernels.log_sum_exp(row) == pytest.approx(exact, rel=1e-7, abs=1e-6)
    assert log_sum_exp(row) == pytest.approx(exact, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize("vocab", VOCABS)
def test_it_has_the_same_bits_at_any_place_in_memory(kernels: Kernels, vocab: int) -> None:
    row = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    expected = kernels.log_sum_exp(row)
    for shift in (1, 5, 16):
        moved = np.full(vocab + shift + 20, 99.0, np.float32)[shift : shift + vocab]
        moved[:] = row
        assert kernels.log_sum_exp(moved) == expected


@pytest.mark.parametrize("place", [0, 3, 516])
def test_a_row_that_is_no_distribution_says_so(kernels: Kernels, place: int) -> None:
    for normalise in (kernels.log_sum_exp, log_sum_exp):
        row = np.full(517, -np.inf, np.float32)
        assert normalise(row) == -math.inf
        row[place] = 3.0
        assert normalise(row) == 3.0
        for bad in (math.nan, math.inf):
            row[place] = bad
            assert math.isnan(normalise(row))
