"""Norms and rotary positions against what eager modules compute."""

import pytest
import torch

from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 16, 51, 64, 128, 1000]


def eager_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, rounds_first: bool
) -> torch.Tensor:
    wide = x.double()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounds_first:
        return (weight.double() + offset) * normal.to(x.dtype).double()
    return (weight.double() + offset) * normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("offset", "rounds_first"), [(0.0, True), (1.0, False), (0.0, False)], ids=str
)
def test_rms_norm_rounds_like_its_family(
    kernels: Kernels, dtype: torch.dtype, offset: float, rounds_first: bool
) -> None:
    for size in SIZES:
        x, weight = torch.randn(40, size).to(dtype), torch.randn(size).to(dtype)
        norm = NormWeight(weight, 1e-5, offset, rounds_first)
        y = kernels.rms_norm(x, norm)
        exact = eager_norm(x, weight, 1e-5, offset, rounds_first)
        if dtype is torch.bfloat16:
            # Rarely does the last bit of a sum decide how bf16 rounds.
            assert (y != exact.to(dtype)).float().mean() < 0.01
        torch.testing.assert_close(
            y.double(), exact, rtol=1e-6 if y.itemsize == 4 else 1e-2, atol=1e-6
        )
        for first, rows in ((0, 1), (3, 2), (39, 1), (5, 0)):
            assert torch.equal(
                kernels.rms_norm(x[first : first + rows], norm), y[first : first + rows]
            )


def test_rms_norm_reads_rows_at_a_distance(kernels: Kernels) -> None:
    wide = torch.randn(5, 100)
    norm = NormWeight(torch.randn(40), 1e-6)
    expected = kernels.rms_norm(wide[:, 10:50].contiguous(), norm)
    assert torch.equal(kernels.rms_norm(wide[:, 10:50], norm), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "key_size", "value_size", "rotary_size", "with_norms"),
    [
        (4, 2, 64, 64, 64, False),
        (8, 8, 128, 128, 128, True),
        (2, 1, 80, 48, 32, False),  # partial rotation, values of another size
        (2, 2, 72, 72, 72, True),
    ],
)
def test_rope_and_cache_is_the_chain_of_its_parts(
    kernels: Kernels,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    key_size: int,
    value_size: int,
    rotary_size: int,
    with_norms: bool,
) -> None:
    num_tokens = 37
    sizes = [num_heads * key_size, num_kv_heads * key_size, num_kv_heads * value_size]
    qkv = torch.randn(num_tokens, sum(sizes)).to(dtype)
    angles = torch.rand(num_tokens, rotary_size) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [NormWeight(torch.randn(key_size).to(dtype), 1e-6) for _ in range(2)]
    query_norm, key_norm = norms if with_norms else (None, None)
    q, k, v = (
        part.reshape(len(part), -1, size).clone()
        for part, size in zip(
            torch.split(qkv, sizes, 1), (key_size, key_size, value_size), strict=True
        )
    )
    if query_norm and key_norm:
        q, k = kernels.rms_norm(q, query_norm), kernels.rms_norm(k, key_norm)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, rest = x[..., :rotary_size], x[..., rotary_size:]
        half = torch.cat((-a[..., rotary_size // 2 :], a[..., : rotary_size // 2]), -1)
        return torch.cat((a * cos[:, None] + half * sin[:, None], rest), -1)

    fused = LayerPages(4, 16, num_kv_heads, key_size, value_size, dtype)
    single = LayerPages(4, 16, num_kv_heads, key_size, value_size, dtype)
    step = StepTables(
        slots=torch.randperm(64)[:num_tokens].contiguous(),
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.zeros(1, 4, dtype=torch.int32),
        block_size=16,
    )
    kernels.rope_and_cache(fused, step, qkv, num_heads, cos, sin, query_norm, key_norm)
    kernels.write_kv(single, step, rotated(k), v)
    assert torch.equal(qkv[:, : sizes[0]], rotated(q).flatten(1))
    assert torch.equal(fused.keys, single.keys) and torch.equal(fused.values, single.values)
