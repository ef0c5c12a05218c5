"""Packed linear layers against the same product in double precision, and against themselves."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from footplate.backend.kernels.linear import Activation, PackedGatedMLP, PackedLinear
from footplate.backend.kernels.ops import Kernels

DTYPES = [torch.float32, torch.bfloat16]

# [n, k]: whole panels, a tail of lanes, a tail of a word, one and several blocks of k.
SHAPES = [(64, 64), (100, 72), (37, 51), (1, 8), (768, 768), (16, 1025), (192, 3072)]

# Largest error of a product, relative to the largest element of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, k) / math.sqrt(k)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_is_the_product(kernels: Kernels, n: int, k: int, dtype: torch.dtype) -> None:
    w, bias, x = weight(n, k, dtype), torch.randn(n).to(dtype), torch.randn(23, k).to(dtype)
    truth = x.double() @ w.double().T
    for y, exact in (
        (PackedLinear(kernels, w)(x), truth),
        (PackedLinear(kernels, w, bias)(x), truth + bias.double()),
    ):
        assert y.dtype is dtype
        assert (y - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_added_to_the_rounded_result(kernels: Kernels, dtype: torch.dtype) -> None:
    x, residual = torch.randn(9, 72).to(dtype), torch.randn(9, 100).to(dtype)
    linear = PackedLinear(kernels, weight(100, 72, dtype))
    assert torch.equal(linear(x, residual), linear(x) + residual)


@pytest.mark.parametrize(("n", "k"), [(768, 768), (512, 3072), (256, 1024), (130, 200)])
def test_bf16_equals_torch_bit_for_bit(kernels: Kernels, n: int, k: int) -> None:
    if kernels.instruction_set != "avx512_bf16":
        pytest.skip("torch uses the dot product of bf16 pairs here, and its rounding")
    w, bias = weight(n, k, torch.bfloat16), torch.randn(n).bfloat16()
    linear = PackedLinear(kernels, w, bias)
    for rows in (4, 7, 32, 100):
        x = torch.randn(rows, k).bfloat16()
        assert torch.equal(linear(x), functional.linear(x, w, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_batch(
    kernels: Kernels, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    x = torch.randn(512, 200).to(dtype)
    linear = PackedLinear(kernels, weight(150, 200, dtype))
    expected = linear(x)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        assert torch.equal(linear(x), expected)
        for rows in range(1, 65):
            first = (rows * 7) % 448
            assert torch.equal(linear(x[first : first + rows]), expected[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_what_stands_in_the_others(kernels: Kernels, dtype: torch.dtype) -> None:
    # An odd k: the last word of a row of bf16 is only half its own.
    x = torch.randn(7, 51).to(dtype)
    linear = PackedLinear(kernels, weight(40, 51, dtype))
    expected = linear(x)
    x[3] = torch.nan
    y = linear(x)
    assert y[3].isnan().all()
    y[3] = expected[3]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_projections_are_the_single_ones(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(5, 48).to(dtype)
    for sizes in ((64, 32, 32), (24, 8, 8)):
        weights = [weight(size, 48, dtype) for size in sizes]
        biases = [torch.randn(size).to(dtype) for size in sizes]
        fused = PackedLinear(kernels, weights, biases)(x)
        single = [PackedLinear(kernels, w, b)(x) for w, b in zip(weights, biases, strict=True)]
        assert torch.equal(fused, torch.cat(single, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_and_strides_are_kept(kernels: Kernels, dtype: torch.dtype) -> None:
    linear = PackedLinear(kernels, weight(20, 32, dtype))
    wide = torch.randn(6, 64).to(dtype)
    expected = linear(wide[:, 8:40].contiguous())
    assert torch.equal(linear(wide[:, 8:40]), expected)
    assert torch.equal(linear(wide[:, 8:40][None]), expected[None])
    assert linear(wide[:0, :32]).shape == (0, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight_come_back(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        w = weight(n, k, dtype)
        ids = torch.randint(n, (2, 30))
        packed = PackedLinear(kernels, w)
        assert torch.equal(packed.rows(ids), w[ids])
        for no_such_row in (-1, n):
            with pytest.raises(IndexError):
                packed.rows(torch.tensor([0, no_such_row]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_results_are_the_same_numbers_in_float32(kernels: Kernels, dtype: torch.dtype) -> None:
    linear = PackedLinear(kernels, weight(75, 64, dtype), torch.randn(75).to(dtype))
    x = torch.randn(9, 64).to(dtype)
    assert torch.equal(linear(x, wide=True), linear(x).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("n", [64, 48, 23])
def test_gated_mlp_is_the_chain_of_its_modules(
    kernels: Kernels, dtype: torch.dtype, activation: str, n: int
) -> None:
    gate, up, down = (weight(n, 51, dtype), weight(n, 51, dtype), weight(30, n, dtype))
    biases = torch.randn(2, n).to(dtype)
    x, residual = torch.randn(19, 51).to(dtype), torch.randn(19, 30).to(dtype)
    packed_down = PackedLinear(kernels, down)
    for gate_bias, up_bias in ((None, None), (biases[0], biases[1])):
        mlp = PackedGatedMLP(
            kernels,
            gate,
            up,
            packed_down,
            activation="silu" if activation == "silu" else "gelu_tanh",
            gate_bias=gate_bias,
            up_bias=up_bias,
        )
        g = PackedLinear(kernels, gate, gate_bias)(x)
        u = PackedLinear(kernels, up, up_bias)(x)
        if activation == "silu":
            expected = functional.silu(g) * u
        else:
            expected = functional.gelu(g, approximate="tanh") * u
        hidden = mlp.hidden(x)
        # An exponential is right within an ulp, and rarely that decides how bf16 rounds.
        torch.testing.assert_close(hidden, expected)
        if dtype is torch.bfloat16:
            assert (hidden != expected).float().mean() < 0.02
        assert torch.equal(mlp(x, residual), packed_down(hidden) + residual)
        assert torch.equal(mlp.hidden(x[7:8]), hidden[7:8])
        assert mlp(x[:0]).shape == (0, 30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
def test_gates_of_gpt_oss_are_clamped_and_shifted(
    kernels: Kernels, dtype: torch.dtype, limit: float | None
) -> None:
    gate, up = weight(40, 51, dtype), weight(40, 51, dtype)
    down = PackedLinear(kernels, weight(30, 40, dtype))
    mlp = PackedGatedMLP(kernels, gate, up, down, "swiglu_oai", limit=limit, alpha=1.702)
    x = 2 * torch.randn(19, 51).to(dtype)
    x[3] = torch.nan
    g, u = PackedLinear(kernels, gate)(x), PackedLinear(kernels, up)(x)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    expected = (u + 1) * (g * torch.sigmoid(g * 1.702))
    hidden = mlp.hidden(x)
    torch.testing.assert_close(hidden, expected, equal_nan=True)
    assert hidden[3].isnan().all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_any_gate_can_be_clamped(kernels: Kernels, activation: Activation) -> None:
    gate, up = weight(40, 51, torch.float32), weight(40, 51, torch.float32)
    down = PackedLinear(kernels, weight(30, 40, torch.float32))
    mlp = PackedGatedMLP(kernels, gate, up, down, activation, limit=0.7)
    x = 2 * torch.randn(19, 51)
    g = PackedLinear(kernels, gate)(x).clamp(max=0.7)
    u = PackedLinear(kernels, up)(x).clamp(-0.7, 0.7)
    silu = activation == "silu"
    expected = (functional.silu(g) if silu else functional.gelu(g, approximate="tanh")) * u
    torch.testing.assert_close(mlp.hidden(x), expected)
