#!/usr/bin/env python3
"""Measure what a JSON schema costs a step of the engine: scheduler, model, masks and sampling.

    scripts/measure_structured_step.py
    scripts/measure_structured_step.py --rows 8 --dtype float32

The same requests run with a schema and without, in alternating rounds of one process: an engine
core on a model with random weights, and a synthetic tokenizer of its size. Steps in which every
request gets a token are compared. Ratios are taken within pairs of neighbouring rounds.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import msgspec
from cyclopts import App

from benchmark import make_random_model
from benchmark_structured import ORDER, synthetic_tokenizer
from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.structured.compiler import GrammarCompiler
from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.benchmark.report import environment, num_cores
from footplate.frontend.benchmark.workload import LengthRange, Workload, make_work
from footplate.frontend.structured import GrammarTranslator
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import Grammar, TokenParams

Shape = Literal["llama-tiny", "llama-160m"]
Dtype = Literal["bfloat16", "float32"]

CLIENT = b"client"
# So long that no output comes to its end.
SCHEMA = {"type": "array", "items": ORDER, "minItems": 500, "$defs": ORDER["$defs"]}

app = App(name="measure_structured_step.py", help=__doc__, help_format="plaintext")


@app.default
def main(
    *,
    random_model: Shape = "llama-160m",
    dtype: Dtype = "bfloat16",
    rows: int = 32,
    input_len: int = 128,
    output_len: int = 64,
    rounds: int = 8,
    threads: int | None = None,
) -> None:
    """Print medians.

    Args:
        random_model: its shape.
        dtype: of the weights.
        rows: requests at once.
        input_len: tokens of each prompt.
        output_len: tokens of each output.
        rounds: with the schema, and as many without.
        threads: of the model; all cores if not given.
    """
    where = environment()
    with tempfile.TemporaryDirectory() as made:
        loop = Loop(random_model, dtype, rows, threads or num_cores(), Path(made))
    grammar = GrammarTranslator().translate(StructuredOutputsParams(json=SCHEMA))
    for warm_up in (None, grammar):
        loop.run(rows, input_len, 8, warm_up, seed=-1)
    plain: list[float] = []
    constrained: list[float] = []
    for seed in range(rounds):
        pair = [(plain, None), (constrained, grammar)]
        for medians, wanted in pair if seed % 2 else reversed(pair):
            steps = loop.run(rows, input_len, output_len, wanted, seed)
            medians.append(1e3 * statistics.median(steps))
    ratios = sorted(b / a for a, b in zip(plain, constrained, strict=True))
    print(f"{where['cpu']}, threads: {threads or num_cores()}, {random_model}, {dtype}")
    print(f"{rows} requests, {input_len} tokens in, {output_len} out, {rounds} rounds of each")
    print(f"step without a schema  {statistics.median(plain):8.2f} ms")
    print(f"step with it           {statistics.median(constrained):8.2f} ms")
    print(
        f"ratio                  {statistics.median(ratios):8.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


class Loop:
    """An engine core, driven without processes."""

    def __init__(
        self,
        model: Shape,
        dtype: Dtype,
        rows: int,
        threads: int,
        folder: Path,
    ) -> None:
        scheduler = SchedulerConfig(max_num_seqs=rows)
        cache = CacheConfig(kv_cache_memory_bytes=2**29, enable_prefix_caching=False)
        runner = load_model_runner(
            ModelConfig(model=make_random_model(model, dtype), dtype=dtype, num_threads=threads),
            cache,
            scheduler,
            lambda phase, fraction: None,
        )
        self._vocab_size = runner.facts.model.vocab_size
        synthetic_tokenizer(folder, self._vocab_size)
        engine = LlguidanceEngine(str(folder), self._vocab_size, ())
        engine.compile(Grammar('start: "a"'))  # reads the vocabulary while the folder is there
        self._compiled = threading.Event()
        compiler = GrammarCompiler({"llguidance": lambda: engine}, self._compiled.set)
        self._core = EngineCore(
            runner, cache, scheduler, epoch=1, clock=time.monotonic, grammars=compiler
        )
        self._core.join(CLIENT)

    def run(
        self, rows: int, input_len: int, output_len: int, grammar: Grammar | None, seed: int
    ) -> list[float]:
        """Seconds of each step that gave every request a token."""
        core = self._core
        lengths = LengthRange(input_len, input_len), LengthRange(output_len, output_len)
        work = make_work(Workload(rows, *lengths, seed=seed), self._vocab_size)
        params = TokenParams(1.0, 1.0, 0, 0.0, 0, output_len, 0, (), grammar=grammar)
        for handle, item in enumerate(work):
            own = msgspec.structs.replace(params, seed=handle)
            core.handle(CLIENT, AddRequest(handle, item.prompt_token_ids, own))
        if grammar is not None and not core.has_work:
            self._compiled.wait()
        seconds, num_ended = [], 0
        while num_ended < rows:
            since = time.perf_counter()
            core.step()
            took = time.perf_counter() - since
            for _, outputs in core.take_outputs():
                num_ended += len(outputs.finished)
                for finished in outputs.finished:
                    if finished.message:
                        sys.exit(f"measure_structured_step.py: {finished.message}")
                if len(outputs.handles) == rows and not outputs.started:
                    seconds.append(took)
        return seconds


if __name__ == "__main__":
    app()
