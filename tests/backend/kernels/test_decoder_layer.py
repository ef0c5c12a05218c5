"""One call of a whole layer gives the bits that its parts give behind one another."""

from collections.abc import Callable

import pytest
import torch

from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.decoder_layer import DecoderLayer
from footplate.backend.kernels.linear import PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels

HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 68, 90, 4, 2, 18
SCALE, WINDOW, SOFTCAP = 0.3, 9, 5.0
# One request of 5 tokens behind 12, and one decode behind 30.
POSITIONS = [*range(12, 17), 30]
BLOCK_TABLES = [[3, 1], [0, 2]]


class Parts:
    """A layer, random, and what its parts make of a step when they are called one by one."""

    def __init__(
        self, kernels: Kernels, dtype: torch.dtype, quantization: Quantization | None, plain: bool
    ) -> None:
        def weight(n: int, k: int) -> torch.Tensor:
            w: torch.Tensor = (torch.randn(n, k) / k**0.5).to(dtype)
            return w

        def norm(size: int) -> NormWeight:
            return NormWeight(torch.rand(size).add(0.5).to(dtype), 1e-5)

        def linear(n: int, k: int) -> PackedLinear:
            return PackedLinear(kernels, weight(n, k), None, quantization)

        self.kernels = kernels
        self.input_norm, self.mlp_norm = norm(HIDDEN), norm(HIDDEN)
        self.query_norm = None if plain else norm(SIZE)
        self.key_norm = None if plain else norm(SIZE)
        self.window = None if plain else WINDOW
        self.softcap = None if plain else SOFTCAP
        self.sinks = None if plain else torch.randn(HEADS)
        self.qkv = linear((HEADS + 2 * KV_HEADS) * SIZE, HIDDEN)
        self.output = linear(HIDDEN, HEADS * SIZE)
        gate, up, down = weight(INNER, HIDDEN), weight(INNER, HIDDEN), linear(HIDDEN, INNER)
        self.mlp = PackedGatedMLP(kernels, gate, up, down, quantization=quantization)

    def whole(self) -> DecoderLayer:
        return DecoderLayer(
            self.kernels,
            input_norm=self.input_norm,
            qkv=self.qkv,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            scale=SCALE,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            output=self.output,
            mlp_norm=self.mlp_norm,
            mlp=self.mlp,
        )

    def one_by_one(
        self,
        cache: LayerPages,
        step: StepTables,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        kernels = self.kernels
        qkv = self.qkv(kernels.rms_norm(hidden, self.input_norm))
        kernels.rope_and_cache(cache, step, qkv, HEADS, cos, sin, self.query_norm, self.key_norm)
        queries = qkv[:, : HEADS * SIZE].view(-1, HEADS, SIZE)
        attended = kernels.paged_attention(
            cache, step, queries, SCALE, self.window, self.softcap, self.sinks
        )
        hidden = self.output(attended.flatten(1), hidden)
        return self.mlp(kernels.rms_norm(hidden, self.mlp_norm), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_whole_layer_is_its_parts(
    kernels: Kernels,
    threads: Callable[[int], None],
    num_threads: int,
    plain: bool,
    quantization: Quantization | None,
    dtype: torch.dtype,
) -> None:
    threads(num_threads)
    parts = Parts(kernels, dtype, quantization, plain)
    before = LayerPages(4, 16, KV_HEADS, SIZE, SIZE, dtype)
    before.keys.normal_()
    before.values.normal_()
    cos, sin = torch.randn(2, len(POSITIONS), SIZE).to(dtype)
    hidden = torch.randn(len(POSITIONS), HIDDEN).to(dtype)
    tables = torch.tensor(BLOCK_TABLES)
    requests = [0] * 5 + [1]
    slots = [
        int(tables[request, position // 16]) * 16 + position % 16
        for request, position in zip(requests, POSITIONS, strict=True)
    ]
    step = StepTables(
        slots=torch.tensor(slots),
        query_starts=torch.tensor([0, 5, 6], dtype=torch.int32),
        context_lens=torch.tensor([17, 31], dtype=torch.int32),
        block_tables=tables.int(),
        block_size=16,
    )
    results = []
    for run in (parts.one_by_one, parts.whole()):
        cache = LayerPages(4, 16, KV_HEADS, SIZE, SIZE, dtype)
        cache.keys.copy_(before.keys)
        cache.values.copy_(before.values)
        results.append((run(cache, step, hidden.clone(), cos, sin), cache.keys, cache.values))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
    assert results[0][0].isfinite().all()
