"""What every attention backend must do, held against dense attention in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from footplate.backend.runner import torch_step
from footplate.backend.runner.attention_backend import (
    AttentionBackend,
    AttentionOptions,
    LayerShape,
)
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.torch_attention import TorchAttention

CPU = torch.device("cpu")
NUM_BLOCKS = 40


@dataclass(frozen=True)
class Layer:
    """A layer's shape, and how it attends."""

    num_heads: int = 4
    num_kv_heads: int = 2
    key_size: int = 16
    value_size: int = 16
    options: AttentionOptions = field(default_factory=lambda: AttentionOptions(scale=0.25))
    dtype: torch.dtype = torch.float32


LAYERS = {
    "multi-head": Layer(num_kv_heads=4),
    "grouped": Layer(),
    "grouped by 7": Layer(num_heads=14),
    "multi-query": Layer(num_heads=8, num_kv_heads=1),
    "odd head size": Layer(key_size=20, value_size=20),
    "values smaller than keys": Layer(key_size=24, value_size=16),
    "values larger than keys": Layer(key_size=12, value_size=20),
    "window": Layer(options=AttentionOptions(0.25, window=6)),
    "window of a block": Layer(options=AttentionOptions(0.25, window=4)),
    "window of one": Layer(options=AttentionOptions(0.25, window=1)),
    "softcap": Layer(options=AttentionOptions(0.5, softcap=1.5)),
    "sinks": Layer(options=AttentionOptions(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))),
    "all at once": Layer(
        key_size=12,
        options=AttentionOptions(0.4, 5, 2.0, torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ),
    "bfloat16": Layer(dtype=torch.bfloat16),
    "bfloat16 multi-head": Layer(num_kv_heads=4, dtype=torch.bfloat16),
    "bfloat16 sinks": Layer(
        options=AttentionOptions(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
        dtype=torch.bfloat16,
    ),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=["torch"])
def make_backend(request: pytest.FixtureRequest) -> Any:
    return lambda block_size: TorchAttention(CPU, block_size)


class Sequences:
    """Random queries, keys and values of sequences, and pages for them in random order."""

    def __init__(self, layer: Layer, lengths: Sequence[int], block_size: int) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))

        def random(length: int, heads: int, size: int) -> torch.Tensor:
            return torch.randn(length, heads, size, generator=generator).to(layer.dtype)

        self.layer = layer
        self.block_size = block_size
        self.queries = [random(n, layer.num_heads, layer.key_size) for n in lengths]
        self.keys = [random(n, layer.num_kv_heads, layer.key_size) for n in lengths]
        self.values = [random(n, layer.num_kv_heads, layer.value_size) for n in lengths]
        free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        self.tables = [[free.pop() for _ in range(-(-n // block_size))] for n in lengths]

    def allocate(self, backend: AttentionBackend[Any, Any]) -> Any:
        layer = self.layer
        shape = LayerShape(layer.num_kv_heads, layer.key_size, layer.value_size, layer.dtype)
        return backend.allocate({0: shape}, NUM_BLOCKS)[0]

    def attend(
        self,
        backend: AttentionBackend[Any, Any],
        cache: Any,
        pieces: Sequence[tuple[int, int, int]],
    ) -> list[torch.Tensor]:
        """One step over (sequence, start, end) pieces; the output of each piece."""
        chunks = [Chunk([0] * (end - start), start, self.tables[i]) for i, start, end in pieces]

        def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
            joined = torch.cat([tensors[i][start:end] for i, start, end in pieces])
            # As it comes from a model: head-major in memory.
            return joined.transpose(0, 1).contiguous().transpose(0, 1)

        step = backend.begin_step(RaggedBatch.of_chunks(chunks, [], self.block_size))
        with torch.inference_mode():
            out = backend.attend(
                step,
                cache,
                flat(self.queries),
                flat(self.keys),
                flat(self.values),
                self.layer.options,
            )
        assert out.dtype is self.layer.dtype
        return list(torch.split(out, [end - start for _, start, end in pieces]))

    def expected(self, index: int) -> torch.Tensor:
        """Dense attention over the whole sequence, float64, [length, num_heads, value_size]."""
        options, num_heads = self.layer.options, self.layer.num_heads
        q, k, v = (x[index].double() for x in (self.queries, self.keys, self.values))
        k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * options.scale
        if options.softcap is not None:
            scores = (scores / options.softcap).tanh() * options.softcap
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = distance < 0
        if options.window is not None:
            hidden |= distance >= options.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if options.sinks is not None:
            sinks = options.sinks.double()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, sinks), dim=2)
        weights = scores.softmax(dim=2)[:, :, : len(q)]
        return torch.einsum("hqk,khd->qhd", weights, v)

    def check(self, pieces: Sequence[tuple[int, int, int]], outputs: list[torch.Tensor]) -> None:
        for (i, start, end), output in zip(pieces, outputs, strict=True):
            torch.testing.assert_close(
                output.double(),
                self.expected(i)[start:end],
                rtol=0,
                atol=TOLERANCE[self.layer.dtype],
            )


every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@every_layer
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_whole_prompts_then_decodes(make_backend: Any, layer: Layer, block_size: int) -> None:
    lengths = (9, 1, 14, 5)
    if block_size == 1:
        lengths = (9, 1, 14, 4)
    sequences = Sequences(layer, [n + 2 for n in lengths], block_size)
    backend = make_backend(block_size)
    cache = sequences.allocate(backend)
    prompts = [(i, 0, n) for i, n in enumerate(lengths)]
    sequences.check(prompts, sequences.attend(backend, cache, prompts))
    for step in range(2):
        decodes = [(i, n + step, n + step + 1) for i, n in enumerate(lengths)]
        sequences.check(decodes, sequences.attend(backend, cache, decodes))


@every_layer
@pytest.mark.parametrize("chunks", [(1, 3, 10, 2, 7), (8, 15), (23,), (22, 1), (1,) * 23])
def test_any_chunking(make_backend: Any, layer: Layer, chunks: tuple[int, ...]) -> None:
    sequences = Sequences(layer, [sum(chunks)], block_size=4)
    backend = make_backend(4)
    cache = sequences.allocate(backend)
    start = 0
    for count in chunks:
        piece = [(0, start, start + count)]
        sequences.check(piece, sequences.attend(backend, cache, piece))
        start += count


@every_layer
def test_decodes_and_chunks_in_one_step(make_backend: Any, layer: Layer) -> None:
    sequences = Sequences(layer, [30, 18, 7, 21, 3], block_size=4)
    backend = make_backend(4)
    cache = sequences.allocate(backend)
    sequences.attend(backend, cache, [(0, 0, 29), (1, 0, 6), (2, 0, 6), (4, 0, 2)])
    # Decodes of very different lengths, not side by side; a first and a second chunk.
    mixed = [(0, 29, 30), (1, 6, 18), (4, 2, 3), (3, 0, 21), (2, 6, 7)]
    sequences.check(mixed, sequences.attend(backend, cache, mixed))


def test_chunks_of_one_sequence_in_one_step(make_backend: Any) -> None:
    """Every key is written before any is read, whatever the order of the chunks."""
    sequences = Sequences(LAYERS["window"], [20], block_size=4)
    backend = make_backend(4)
    pieces = [(0, 12, 19), (0, 0, 12), (0, 19, 20)]
    sequences.check(pieces, sequences.attend(backend, sequences.allocate(backend), pieces))


def test_a_repeated_step_changes_nothing(make_backend: Any) -> None:
    sequences = Sequences(LAYERS["grouped"], [11, 6], block_size=4)
    backend = make_backend(4)
    cache = sequences.allocate(backend)
    pieces = [(0, 0, 11), (1, 0, 6)]
    once = sequences.attend(backend, cache, pieces)
    again = sequences.attend(backend, cache, pieces)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_a_broken_request_left_behind_is_not_seen(make_backend: Any, bad: float) -> None:
    """A page keeps what its last owner wrote; hidden keys must not reach the next one."""
    sequences = Sequences(LAYERS["grouped"], [15, 6, 9], block_size=4)
    backend = make_backend(4)
    cache = sequences.allocate(backend)
    # The last pages of both, which they will not fill, and page 0, which tables are padded with.
    first, second = sequences.tables[1], sequences.tables[2]
    broken = replace_tables(sequences, [[first[-1], second[-1], 0, second[0]]])
    for tensors in (broken.queries, broken.keys, broken.values):
        tensors[0] = torch.full_like(tensors[0], bad)
    (output,) = broken.attend(backend, cache, [(0, 0, 15)])
    assert not output.isfinite().all(), "the broken request itself must see that it is broken"
    pieces = [(1, 0, 5), (2, 0, 8)]
    sequences.check(pieces, sequences.attend(backend, cache, pieces))
    pieces = [(1, 5, 6), (2, 8, 9)]
    sequences.check(pieces, sequences.attend(backend, cache, pieces))


def replace_tables(sequences: Sequences, tables: list[list[int]]) -> Sequences:
    """The same lengths, other numbers, and these tables."""
    lengths = [len(q) for q in sequences.queries]
    other = Sequences(sequences.layer, lengths, sequences.block_size)
    other.tables = tables
    return other


def test_many_decodes_are_attended_in_several_groups(
    make_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_step.MAX_GATHERED_TOKENS, "cpu", 24)
    lengths = [20, 9, 11, 3, 6, 18, 8, 12]
    sequences = Sequences(LAYERS["grouped"], lengths, block_size=4)
    backend = make_backend(4)
    cache = sequences.allocate(backend)
    sequences.attend(backend, cache, [(i, 0, n - 1) for i, n in enumerate(lengths)])
    decodes = [(i, n - 1, n) for i, n in enumerate(lengths)]
    sequences.check(decodes, sequences.attend(backend, cache, decodes))


def test_layers_with_different_windows_share_a_step(make_backend: Any) -> None:
    backend = make_backend(4)
    sequences = Sequences(LAYERS["grouped"], [17, 12], block_size=4)
    batch = RaggedBatch.of_chunks(
        [Chunk([0] * 17, 0, sequences.tables[0]), Chunk([0] * 12, 0, sequences.tables[1])], [], 4
    )
    step = backend.begin_step(batch)
    q, k, v = (torch.cat(x) for x in (sequences.queries, sequences.keys, sequences.values))
    for window in (None, 5, 3, None):
        options = AttentionOptions(0.25, window=window)
        sequences.layer = replace(sequences.layer, options=options)
        out = backend.attend(step, sequences.allocate(backend), q, k, v, options)
        sequences.check([(0, 0, 17), (1, 0, 12)], list(torch.split(out, [17, 12])))


def test_bytes_per_block_is_what_is_allocated(make_backend: Any) -> None:
    backend = make_backend(16)
    shape = LayerShape(2, 24, 16, torch.bfloat16)
    cache = backend.allocate({0: shape}, 3)[0]
    assert backend.bytes_per_block(shape) == 2 * (24 + 16) * 2 * 16
    assert cache.keys.nbytes + cache.values.nbytes == 3 * backend.bytes_per_block(shape)
    assert not cache.keys.any() and not cache.values.any()
