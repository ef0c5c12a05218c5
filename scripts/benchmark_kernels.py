#!/usr/bin/env python3
"""Measure the CPU kernels beside torch's own: linear layers and attention of two model shapes.

    scripts/benchmark_kernels.py
    scripts/benchmark_kernels.py --layers down --rows 1 32 --formats int8 int4 --no-attention

All ways of computing one thing take turns, and the best time of each counts: other work on the
machine only ever adds to a time. Weights and caches are rotated through more memory than fits the
processor's caches, and the rate at which memory can be read is measured in the same turns.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

import torch
from cyclopts import App, Parameter
from torch.nn.functional import linear

from footplate.backend.kernels.build import cache_folder, load
from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.linear import PackedLinear, Quantization
from footplate.backend.kernels.ops import Kernels

# [n, k] of the layers of qwen3-0.6b and of a 160 M parameter Llama.
LAYERS = {
    "Q gate/up": (6144, 1024),
    "Q down": (1024, 3072),
    "L gate/up": (6144, 768),
    "L down": (768, 3072),
    "L o": (768, 768),
    "Q head": (151_936, 1024),
}
# Query heads, key heads, head size.
HEADS = {"Q": (16, 8, 128), "L": (12, 12, 64)}
# Context, sequences, new tokens per sequence.
STEPS = [(128, 1, 1), (128, 32, 1), (1024, 1, 1), (1024, 16, 1), (512, 1, 512), (4096, 1, 512)]

Format = Literal["bf16", "fp32", "int8", "int4"]
QUANTIZATIONS: dict[Format, Quantization | None] = {
    "bf16": None,
    "fp32": None,
    "int8": "int8",
    "int4": "int4",
}
MEMORY_BYTES = 400_000_000  # many times what the caches hold

T = TypeVar("T")
Way = Callable[[], object]

app = App(name="benchmark_kernels.py", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    rows: Annotated[Sequence[int], Parameter(consume_multiple=True)] = (1, 4, 16, 32, 128, 512),
    formats: Annotated[Sequence[Format], Parameter(consume_multiple=True)] = (
        "bf16",
        "fp32",
        "int8",
        "int4",
    ),
    layers: str = "",
    attention: bool = True,
    seconds: float = 3.0,
    threads: int | None = None,
    compiler: str | None = None,
) -> None:
    """Print one line per measurement.

    Args:
        rows: rows of activations of a linear layer.
        formats: of its weights.
        layers: only those whose name contains this.
        attention: measure attention too.
        seconds: per line.
        threads: as torch chooses by default.
        compiler: to compile the kernels with.
    """
    library = load(cache_folder(os.environ), compiler)
    if library is None:
        sys.exit("there are no kernels to measure")
    kernels = Kernels(library)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    print(
        f"{kernels.instruction_set}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("microseconds (GB/s of weights or cache, GFLOP/s); read: GB/s that memory gave meanwhile")
    for name, (n, k) in LAYERS.items():
        if layers in name:
            for weight_format in formats:
                _measure_linear(kernels, name, n, k, weight_format, rows, seconds)
    if attention:
        for (name, heads), step in itertools.product(HEADS.items(), STEPS):
            _measure_attention(kernels, name, *heads, *step, seconds)


def _measure_linear(
    kernels: Kernels,
    name: str,
    n: int,
    k: int,
    weight_format: Format,
    rows: Sequence[int],
    seconds: float,
) -> None:
    dtype = torch.float32 if weight_format == "fp32" else torch.bfloat16
    quantization = QUANTIZATIONS[weight_format]
    weight = torch.randn(n, k).div_(math.sqrt(k)).to(dtype)
    first = PackedLinear(kernels, weight, quantization=quantization)
    num_copies = -(-MEMORY_BYTES // first.nbytes)
    ours = [first]
    ours += [
        PackedLinear(kernels, weight, quantization=quantization) for _ in range(num_copies - 1)
    ]
    theirs = [] if quantization else [weight.clone() for _ in range(num_copies)]
    packed = []
    if weight_format == "bf16":
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for _ in range(num_copies)]
    for m in rows:
        if m * n > 40_000_000:  # nobody wants logits of that many rows
            continue
        x = torch.randn(m, k).to(dtype)
        ways = {"footplate": _rotated(PackedLinear.__call__, ours, x)}
        if packed:
            ways["oneDNN packed"] = _rotated(_prepacked_linear, packed, x)
        if theirs:
            ways["F.linear"] = _rotated(_plain_linear, theirs, x)
        _report(f"{name} {weight_format} M={m}", ways, first.nbytes, 2 * m * n * k, seconds)


def _measure_attention(
    kernels: Kernels,
    name: str,
    num_heads: int,
    num_kv_heads: int,
    size: int,
    context: int,
    num_requests: int,
    num_new: int,
    seconds: float,
) -> None:
    pages = -(-context // 16)
    num_blocks, num_tokens = pages * num_requests, num_requests * num_new
    layers = []
    for _ in range(1 + 100_000_000 // (num_blocks * 16 * num_kv_heads * size * 4)):
        layer = LayerPages(num_blocks, 16, num_kv_heads, size, size, torch.bfloat16)
        layer.keys.normal_()
        layer.values.normal_()
        layers.append(layer)
    tables = torch.randperm(num_blocks).view(num_requests, pages)
    positions = torch.arange(context - num_new, context)
    step = StepTables(
        slots=(tables[:, positions // 16] * 16 + positions % 16).flatten().contiguous(),
        query_starts=torch.arange(0, num_tokens + 1, num_new, dtype=torch.int32),
        context_lens=torch.full((num_requests,), context, dtype=torch.int32),
        block_tables=tables.int(),
        block_size=16,
    )
    query = torch.randn(num_tokens, num_heads, size).bfloat16()
    turns = itertools.cycle(layers)
    ways: dict[str, Way] = {
        "footplate": lambda: kernels.paged_attention(next(turns), step, query, size**-0.5)
    }
    visible = num_requests * int((positions + 1).sum())
    what = f"{name} attention, context {context}, {num_requests} x {num_new} new tokens"
    read = layers[0].keys.nbytes + layers[0].values.nbytes
    _report(what, ways, read, 4 * visible * num_heads * size, seconds)


def _prepacked_linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _plain_linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def _rotated(
    compute: Callable[[T, torch.Tensor], torch.Tensor], weights: Sequence[T], x: torch.Tensor
) -> Way:
    """A call that uses the next of `weights` each time."""
    turns = itertools.cycle(weights)
    return lambda: compute(next(turns), x)


def _report(
    what: str, ways: dict[str, Way], num_bytes: int, num_flops: int, seconds: float
) -> None:
    memory = torch.ones(MEMORY_BYTES // 8)
    best = dict.fromkeys(ways, math.inf)
    read_s = math.inf
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        read_s = min(read_s, _seconds(memory.sum))
        for name, _ in itertools.product(ways, range(4)):
            best[name] = min(best[name], _seconds(ways[name]))
    columns = [
        f"{name} {s * 1e6:,.0f} ({num_bytes / s / 1e9:.0f}, {num_flops / s / 1e9:,.0f})"
        for name, s in best.items()
    ]
    print(f"{what:32}  {'  '.join(columns)}  read {memory.nbytes / read_s / 1e9:.0f}", flush=True)


def _seconds(way: Way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    app()
