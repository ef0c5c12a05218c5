#!/usr/bin/env python3
"""Measure where the time of a step goes, and how far it is from what the machine allows.

    scripts/measure_step.py --random-model llama-160m
    scripts/measure_step.py --random-model qwen3-0.6b --quantization int8 --rows 1 --rows 32

Every part of a decoder layer is measured by itself, with weights and caches that rotate through
more memory than the processor's caches hold, and so is the whole step, as the engine runs it. The
floor is what reading its bytes takes at the rate at which memory was read meanwhile, or its
multiplications at the best rate of the kernels, whichever is more.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from cyclopts import App, Parameter

from benchmark import make_random_model
from footplate.backend.kernels import build
from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.linear import PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels
from footplate.backend.request import Request
from footplate.backend.runner.checkpoint import find_folder, load_config
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.runner.sampler import Sampler
from footplate.backend.runner.warm_up import dummy_request
from footplate.backend.step import ModelRunner, StepPlan
from footplate.frontend.benchmark.report import num_cores
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.token_params import TokenParams

BLOCK_SIZE = 16
ROTATED_BYTES = 200_000_000
SECONDS = 2.0  # of measuring, per part
GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 10**6, 0, ())

app = App(name="measure_step.py", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    model: str = "demo",
    random_model: Literal["llama-tiny", "llama-160m", "qwen3-0.6b"] | None = None,
    quantization: Quantization | None = None,
    rows: Annotated[Sequence[int], Parameter(consume_multiple=True)] = (1, 32, 512),
    context: int = 160,
) -> None:
    """Print a table per number of rows.

    Args:
        model: of the Llama family, in bfloat16: a folder, a cached hub model or "demo".
        random_model: a shape instead.
        quantization: of the weights.
        rows: tokens in a step; up to 64 they are decodes of as many requests, more are prompts.
        context: tokens in the cache of each decoding request.
    """
    if random_model:
        model = make_random_model(random_model, "auto")
    torch.set_grad_enabled(False)
    library = build.load(build.cache_folder(os.environ))
    if library is None:
        sys.exit("measure_step.py: there are no kernels to measure")
    kernels = Kernels(library)
    shape = Shape.of(load_config(find_folder(model)))
    runner = load_model_runner(
        ModelConfig(
            model=model, dtype="bfloat16", quantization=quantization, num_threads=num_cores()
        ),
        CacheConfig(kv_cache_memory_bytes=2**30),
        SchedulerConfig(),
        lambda phase, fraction: None,
    )
    best_rate = _best_rate(kernels, quantization)
    print(
        f"{model}, bfloat16, {quantization or 'not quantised'}, {kernels.instruction_set}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads; best rate {best_rate / 1e9:,.0f} GFLOP/s")
    for count in rows:
        report(kernels, shape, runner, quantization, count, context, best_rate)


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how long a step takes."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Of a configuration of the Llama family."""
        head_size = getattr(config, "head_dim", None)
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=head_size or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One kernel call; `calls` are equal ones on different memory.

    Attributes:
        count: how often it comes in a step.
    """

    name: str
    count: int
    calls: Sequence[Callable[[], object]]
    num_bytes: int
    num_flops: int


def report(
    kernels: Kernels,
    shape: Shape,
    runner: ModelRunner,
    quantization: Quantization | None,
    num_rows: int,
    context: int,
    best_rate: float,
) -> None:
    """Print the parts of a step of so many tokens, their sum, and the whole step."""
    num_requests, num_new = (num_rows, 1) if num_rows <= 64 else (max(1, num_rows // 128), 128)
    if num_new > 1:
        context, num_rows = num_new, num_requests * num_new
    whole = _whole_step(runner, num_requests, num_new, context)
    print(f"\n{num_requests} x {num_new} new tokens, context {context}")
    print(f"{'':12}{'calls':>6}{'ms':>8}{'floor':>8}{'GB/s':>7}{'read':>6}{'GFLOP/s':>9}")
    total = total_floor = 0.0
    for part in _parts(kernels, shape, quantization, num_requests, num_new, context):
        seconds, bandwidth = _measure(part.calls)
        floor = part.count * max(part.num_bytes / bandwidth, part.num_flops / best_rate)
        total += part.count * seconds
        total_floor += floor
        print(
            f"{part.name:12}{part.count:6}{1e3 * part.count * seconds:8.2f}{1e3 * floor:8.2f}"
            f"{part.num_bytes / seconds / 1e9:7.0f}{bandwidth / 1e9:6.0f}"
            f"{part.num_flops / seconds / 1e9:9,.0f}"
        )
    print(f"{'sum':18}{1e3 * total:8.2f}{1e3 * total_floor:8.2f}")
    print(f"{'whole step':18}{1e3 * whole:8.2f}   {total_floor / whole:.0%} of it is the floor")


def _parts(
    kernels: Kernels,
    shape: Shape,
    quantization: Quantization | None,
    num_requests: int,
    num_new: int,
    context: int,
) -> Iterator[Part]:
    m = num_requests * num_new
    query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def linear(name: str, count: int, n: int, k: int, rows: int, bits: Quantization | None) -> Part:
        weight, x = _random(n, k), _random(rows, k)
        made = [PackedLinear(kernels, weight, None, bits)]
        made += [PackedLinear(kernels, weight, None, bits) for _ in _copies(made[0].nbytes)]
        calls = [_call(one, x) for one in made]
        return Part(name, count, calls, made[0].nbytes, 2 * rows * n * k)

    yield linear("qkv", shape.layers, query + 2 * kv, shape.hidden, m, quantization)
    yield from _attention_parts(kernels, shape, num_requests, num_new, context)
    yield linear("output", shape.layers, shape.hidden, query, m, quantization)
    gate, x = _random(shape.inner, shape.hidden), _random(m, shape.hidden)
    down = PackedLinear(kernels, _random(shape.hidden, shape.inner), None, quantization)
    mlps = [PackedGatedMLP(kernels, gate, gate, down, quantization=quantization)]
    gate_bytes = mlps[0].nbytes - down.nbytes
    mlps += [
        PackedGatedMLP(kernels, gate, gate, down, quantization=quantization)
        for _ in _copies(gate_bytes)
    ]
    flops = 4 * m * shape.inner * shape.hidden
    yield Part("gate, up", shape.layers, [_call(mlp.hidden, x) for mlp in mlps], gate_bytes, flops)
    yield linear("down", shape.layers, shape.hidden, shape.inner, m, quantization)
    norm = NormWeight(_random(shape.hidden), 1e-5)
    yield Part("norms", 2 * shape.layers + 1, [lambda: kernels.rms_norm(x, norm)], 4 * x.numel(), 0)
    last: Quantization | None = "int8" if quantization else None
    yield linear("last layer", 1, shape.vocab, shape.hidden, num_requests, last)
    logits = torch.randn(num_requests, shape.vocab)
    sampler, requests = Sampler(kernels), num_requests * [dummy_request(temperature=0.0)]
    yield Part("sampling", 1, [lambda: sampler.sample(logits, requests)], logits.nbytes, 0)


def _attention_parts(
    kernels: Kernels, shape: Shape, num_requests: int, num_new: int, context: int
) -> Iterator[Part]:
    pages = -(-context // BLOCK_SIZE)
    num_blocks, m = pages * num_requests, num_requests * num_new
    sizes = (shape.kv_heads, shape.head_size, shape.head_size, torch.bfloat16)
    num_bytes = 2 * 2 * num_requests * context * shape.kv_heads * shape.head_size
    caches = [LayerPages(num_blocks, BLOCK_SIZE, *sizes) for _ in (0, *_copies(num_bytes))]
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    tables = torch.randperm(num_blocks).view(num_requests, pages)
    positions = torch.arange(context - num_new, context)
    step = StepTables(
        slots=(tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        .flatten()
        .contiguous(),
        query_starts=torch.arange(0, m + 1, num_new, dtype=torch.int32),
        context_lens=torch.full((num_requests,), context, dtype=torch.int32),
        block_tables=tables.int(),
        block_size=BLOCK_SIZE,
    )
    qkv = _random(m, caches[0].row_size(shape.heads))
    cos, sin = _random(2, m, shape.head_size).unbind(0)
    yield Part(
        "rope, cache",
        shape.layers,
        [_call(kernels.rope_and_cache, one, step, qkv, shape.heads, cos, sin) for one in caches],
        2 * qkv.nbytes,
        0,
    )
    query = _random(m, shape.heads, shape.head_size)
    visible = num_requests * int((positions + 1).sum())
    yield Part(
        "attention",
        shape.layers,
        [_call(kernels.paged_attention, one, step, query, 0.1) for one in caches],
        num_bytes,
        4 * visible * shape.heads * shape.head_size,
    )


def _whole_step(runner: ModelRunner, num_requests: int, num_new: int, context: int) -> float:
    """Median seconds."""
    pages = -(-(context + 1) // BLOCK_SIZE)
    requests = [
        Request(
            key=i,
            client=b"",
            handle=i,
            token_ids=[(7 * i + j) % 1000 for j in range(context + (num_new == 1))],
            num_prompt_tokens=context,
            params=GREEDY,
            block_ids=list(range(i * pages, (i + 1) * pages)),
        )
        for i in range(num_requests)
    ]
    for request in requests:  # the first part of its context
        runner.execute(StepPlan([request], [context], []))
        request.num_computed_tokens = context if num_new == 1 else 0
    plan = StepPlan(requests, [num_new] * num_requests, list(range(num_requests)))
    times = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        times.append(_seconds(lambda: runner.execute(plan)))
    return statistics.median(times)


def _best_rate(kernels: Kernels, quantization: Quantization | None) -> float:
    """Multiplications and additions per second of a product that waits for no memory."""
    linear, x = PackedLinear(kernels, _random(1024, 1024), None, quantization), _random(512, 1024)
    return 2 * 512 * 1024 * 1024 / min(_seconds(lambda: linear(x)) for _ in range(200))


def _measure(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Median seconds of a call, and the bytes per second at which memory was read meanwhile."""
    memory = torch.ones(ROTATED_BYTES // 2)
    turns = itertools.cycle(calls)
    times, reads = [], []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        reads.append(_seconds(memory.sum))
        times += [_seconds(next(turns)) for _ in range(max(8, len(calls)))]
    return statistics.median(times), memory.nbytes / statistics.median(reads)


def _copies(num_bytes: int) -> range:
    return range(min(64, ROTATED_BYTES // max(1, num_bytes)))


def _call(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(0.05).bfloat16()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    app()
