"""Experts of a mixture against each of them alone, and against themselves in another batch."""

import math
from collections.abc import Callable

import pytest
import torch

from footplate.backend.kernels.experts import PackedExperts
from footplate.backend.kernels.linear import PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.ops import Kernels

DTYPES = [torch.float32, torch.bfloat16]
INPUTS, SIZE, OUTPUTS, NUM_EXPERTS, TOP_K = 51, 36, 40, 5, 3


def make(
    kernels: Kernels, dtype: torch.dtype, quantization: Quantization | None = None
) -> tuple[PackedExperts, list[PackedGatedMLP]]:
    def weight(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k) / math.sqrt(k)).to(dtype)

    mlps = []
    for _ in range(NUM_EXPERTS):
        down = PackedLinear(kernels, weight(OUTPUTS, SIZE), quantization=quantization)
        gate, up = weight(SIZE, INPUTS), weight(SIZE, INPUTS)
        mlps.append(PackedGatedMLP(kernels, gate, up, down, quantization=quantization))
    return PackedExperts(kernels, mlps), mlps


def rows(dtype: torch.dtype, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.rand(num_tokens, NUM_EXPERTS).argsort(dim=1)[:, :TOP_K]
    return torch.randn(num_tokens, INPUTS).to(dtype), index, torch.rand(num_tokens, TOP_K)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("weights_are_wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_weighted_sum_of_its_experts_slot_by_slot(
    kernels: Kernels,
    dtype: torch.dtype,
    weights_are_wide: bool,
    quantization: Quantization | None,
) -> None:
    experts, mlps = make(kernels, dtype, quantization)
    x, index, weights = rows(dtype, 19)
    if not weights_are_wide:
        weights = weights.to(dtype)
    y = experts(x, index, weights)
    assert y.dtype is dtype
    for token in range(len(x)):
        total = torch.zeros(OUTPUTS)
        for expert, share in zip(index[token].tolist(), weights[token], strict=True):
            total += mlps[expert](x[token : token + 1])[0] * share[None]
        # A compiler may multiply and add in one rounding.
        torch.testing.assert_close(y[token], total.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_in_any_batch_and_on_any_number_of_threads(
    kernels: Kernels, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    experts, _ = make(kernels, dtype)
    x, index, weights = rows(dtype, 700)
    index[:600, 0], index[:600, 1], index[:600, 2] = 4, 2, 0  # more than an expert takes at once
    expected = experts(x, index, weights)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        assert torch.equal(experts(x, index, weights), expected)
        for num_rows in (1, 2, 5, 16, 64):
            for first in (0, 590, 630):
                part = slice(first, first + num_rows)
                assert torch.equal(experts(x[part], index[part], weights[part]), expected[part])


def test_an_expert_nobody_is_routed_to_and_no_token_at_all(kernels: Kernels) -> None:
    experts, mlps = make(kernels, torch.float32)
    x = torch.randn(7, INPUTS)
    index = torch.full((7, 1), 3)
    assert torch.equal(experts(x, index, torch.ones(7, 1)), mlps[3](x))
    assert experts(x[:0], index[:0], torch.ones(0, 1)).shape == (0, OUTPUTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments_are_read_where_they_lie(kernels: Kernels, dtype: torch.dtype) -> None:
    experts, _ = make(kernels, dtype)
    x, index, weights = rows(dtype, 19)
    wide = torch.full((19, 4 * INPUTS), torch.nan).to(dtype)
    wide[:, -INPUTS:] = x
    got = experts(wide[:, -INPUTS:], index.T.contiguous().T, weights.T.contiguous().T)
    assert torch.equal(got, experts(x, index, weights))


def test_a_token_that_is_not_finite_stays_alone(kernels: Kernels) -> None:
    experts, _ = make(kernels, torch.float32)
    x, index, weights = rows(torch.float32, 19)
    expected = experts(x, index, weights)
    x[4] = torch.nan
    y = experts(x, index, weights)
    assert y[4].isnan().all()
    y[4] = expected[4]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("no_such_expert", [-1, NUM_EXPERTS])
def test_an_index_that_names_no_expert_is_an_error(kernels: Kernels, no_such_expert: int) -> None:
    experts, _ = make(kernels, torch.float32)
    x, index, weights = rows(torch.float32, 3)
    index[1, 1] = no_such_expert
    with pytest.raises(IndexError, match="experts 0 to 4"):
        experts(x, index, weights)
