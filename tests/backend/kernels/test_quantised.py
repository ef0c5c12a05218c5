"""Weights of 8 and 4 bits: the arithmetic against an exact emulation, the rounding against what
it may cost, and the result against itself in other batches."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from footplate.backend.kernels.linear import PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.ops import Kernels

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 128), (100, 72), (37, 51), (16, 1025), (256, 768)]
FORMATS: list[Quantization] = ["int8", "int4"]


def as_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    scaled: torch.Tensor = torch.randn(n, k) / k**0.5
    return scaled.to(dtype)


def round_trip(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations after a stay in 8 bits, in blocks along the last dimension."""
    k = x.shape[1]
    blocks = functional.pad(x.float(), (0, -k % block)).view(len(x), -1, block)
    largest = blocks.abs().amax(2, keepdim=True)
    rounded: torch.Tensor = (blocks * (127 / largest)).round() * (largest / 127)
    return rounded.view(len(x), -1)[:, :k].double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS)
def test_product_is_that_of_the_rounded_numbers(
    kernels: Kernels, quantization: Quantization, dtype: torch.dtype
) -> None:
    for n, k in SHAPES:
        w, bias, x = as_weight(n, k, dtype), torch.randn(n).to(dtype), torch.randn(9, k).to(dtype)
        # In float32, so that the weights that come back are not rounded once more.
        rounded = PackedLinear(kernels, w.float(), quantization=quantization)
        weights = rounded.rows(torch.arange(n)).double()
        exact = round_trip(x, k if quantization == "int8" else 128) @ weights.T + bias.double()
        y = PackedLinear(kernels, w, bias, quantization=quantization)(x)
        tolerance = 1e-4 if dtype is torch.float32 else 5e-3
        assert (y - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.009), ("int4", 0.090)])
def test_weights_lose_no_more_than_they_must(
    kernels: Kernels, quantization: Quantization, bound: float
) -> None:
    w = as_weight(128, 1024, torch.float32)
    packed = PackedLinear(kernels, w, quantization=quantization)
    error = packed.rows(torch.arange(128)) - w
    assert error.norm() <= bound * w.norm()
    bits = 8 * packed.nbytes / w.numel()
    assert bits == {"int8": 8 + 32 / 1024, "int4": 4 + 32 / 128}[quantization]


@pytest.mark.parametrize("quantization", FORMATS)
def test_weights_of_any_size_survive(kernels: Kernels, quantization: Quantization) -> None:
    w = torch.randn(32, 256)
    w[0], w[1], w[2], w[3, 1:] = 0, w[1] * 1e-12, w[2] * 1e12, 0
    packed = PackedLinear(kernels, w, quantization=quantization)
    back = packed.rows(torch.arange(32))
    assert torch.equal(back[0], w[0])
    torch.testing.assert_close(back[3, 0], w[3, 0], rtol=0.02, atol=0)
    assert ((back - w).norm(dim=1) <= 0.12 * w.norm(dim=1)).all()
    x = torch.randn(3, 256)
    x[1] = 0
    y = packed(x)
    assert y.isfinite().all()
    assert torch.equal(y[1], torch.zeros(32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS)
def test_a_row_is_the_same_in_any_batch(
    kernels: Kernels,
    quantization: Quantization,
    dtype: torch.dtype,
    threads: Callable[[int], None],
) -> None:
    x = torch.randn(512, 200).to(dtype)
    linear = PackedLinear(kernels, as_weight(150, 200, dtype), quantization=quantization)
    expected = linear(x)
    for num_threads in (1, 2, 3):
        threads(num_threads)
        assert torch.equal(linear(x), expected)
        for rows in range(1, 65, num_threads):
            first = (rows * 7) % 448
            assert torch.equal(linear(x[first : first + rows]), expected[first : first + rows])


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(
    kernels: Kernels, quantization: Quantization, bad: float
) -> None:
    x = torch.randn(7, 300).bfloat16()
    weight = as_weight(40, 300, torch.bfloat16)
    linear = PackedLinear(kernels, weight, quantization=quantization)
    expected = linear(x)
    x[3, 217] = bad
    y = linear(x)
    # Of an int4 layer only the block with the bad number is poisoned, which is enough.
    assert y[3].isnan().all()
    y[3] = expected[3]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", FORMATS)
def test_gated_mlp_is_the_chain_of_its_layers(
    kernels: Kernels, quantization: Quantization, dtype: torch.dtype
) -> None:
    gate, up, down = (as_weight(*shape, dtype) for shape in ((72, 200), (72, 200), (30, 72)))
    x, residual = torch.randn(19, 200).to(dtype), torch.randn(19, 30).to(dtype)
    packed_down = PackedLinear(kernels, down, quantization=quantization)
    mlp = PackedGatedMLP(kernels, gate, up, packed_down, quantization=quantization)
    g = PackedLinear(kernels, gate, quantization=quantization)(x)
    u = PackedLinear(kernels, up, quantization=quantization)(x)
    hidden = mlp.hidden(x)
    torch.testing.assert_close(hidden, functional.silu(g) * u)
    assert torch.equal(mlp(x, residual), packed_down(hidden) + residual)
    assert mlp(x[:0]).shape == (0, 30)


@pytest.mark.parametrize("quantization", FORMATS)
def test_fused_projections_are_the_single_ones(
    kernels: Kernels, quantization: Quantization
) -> None:
    x = torch.randn(5, 256)
    weights = [as_weight(size, 256, torch.float32) for size in (64, 32, 32)]
    fused = PackedLinear(kernels, weights, quantization=quantization)(x)
    single = [PackedLinear(kernels, w, quantization=quantization)(x) for w in weights]
    assert torch.equal(fused, torch.cat(single, dim=1))
