#!/usr/bin/env python3
"""Compare Footplate with other engines: the same work, the same threads, in turn.

    scripts/compare.py --random-model llama-160m --transformers
    scripts/compare.py --random-model llama-160m --work 1x128x128 --work 32x128x64 --transformers \\
        --openvino-python ~/openvino/bin/python --openvino-weights fp --openvino-weights int8 \\
        --llama-server ~/llama.cpp/build/bin/llama-server --gguf llama-160m-bf16.gguf --json it.json

A turn is one engine, started, warmed up, given the work and stopped, in a process of its own; never
do two run at once. A round is one turn of each. Prompts are random token ids, all there at the
start; decoding is greedy, and no token ends an output. Other options go to Footplate's engine.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter

from benchmark import make_random_model
from contenders import OURS, Contender, Listed, ModelFolder, Peers, all_contenders, check
from footplate.frontend import EngineArgs
from footplate.frontend.benchmark.comparison import comparison_table, medians, ratios, turns
from footplate.frontend.benchmark.report import environment, num_cores
from footplate.frontend.benchmark.summary import RequestRecord, count_equal, summarize
from footplate.frontend.benchmark.workload import LengthRange, Workload, make_work
from footplate.protocol.errors import FootplateError
from peer import Job
from peer_process import PeerError, records_of, run_peer, work_of

WARMUP_TOKENS = 4

app = App(name="compare.py", help=__doc__, help_format="plaintext")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    work: Annotated[tuple[str, ...], Listed] = ("1x128x128", "32x128x64")
    """Requests x tokens in x tokens out; lengths may be uniform ranges: 32x64:256x128. May be given
    several times."""

    rounds: int = 3
    """Turns of each engine at each work."""

    seed: int = 0
    """Of prompts and lengths."""

    random_model: Literal["llama-tiny", "llama-160m", "qwen3-0.6b"] | None = None
    """A model of this shape with random weights, made once; instead of --model FOLDER."""

    timeout_s: float = 1800.0
    """Longest turn."""

    json: Path | None = None
    """Write the results of all rounds here."""


@dataclass
class Comparison:
    """All that was measured at one work.

    Attributes:
        rounds: by engine, what `summarize` gives, and start_s.
        failures: by engine, why it took no further turn.
        versions: by engine.
        num_equal: by engine, how many requests had the same tokens as Footplate's.
    """

    work: str
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    failures: dict[str, PeerError] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    num_equal: dict[str, int] = field(default_factory=dict)


@app.default
def main(
    options: Options = Options(),
    peers: Peers = Peers(),  # noqa: B008
    engine_args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(),  # noqa: B008
) -> int:
    """Compare Footplate with other engines: the same work, the same threads, in turn."""
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: must be at least 1")
    workloads = {text: parse_work(text, options.seed) for text in options.work}
    check(peers)
    if options.random_model:
        folder = make_random_model(options.random_model, engine_args.dtype)
        engine_args = dataclasses.replace(engine_args, model=folder)
    model = ModelFolder.read(Path(engine_args.model))
    if engine_args.dtype != "auto":
        model = dataclasses.replace(model, dtype=engine_args.dtype)
    for text, workload in workloads.items():
        if workload.max_len > model.max_len:
            raise ValueError(
                f"--work {text}: up to {workload.max_len} tokens, the model's limit is "
                f"{model.max_len}"
            )
    engine_args = dataclasses.replace(engine_args, threads=engine_args.threads or num_cores())
    where = environment()  # before the rounds, so that the load average is not our own
    contenders = all_contenders(peers, engine_args, model)
    compared = []
    for text, workload in workloads.items():
        job = make_job(model, engine_args, workload)
        comparison = Comparison(text)
        compared.append(comparison)
        compare(contenders, job, options.rounds, options.timeout_s, comparison)
        report(comparison, model, engine_args, workload.num_prompts)
        if options.json:  # what was measured is kept, whatever happens next
            result = as_json(options, peers, engine_args, model, compared) | {"environment": where}
            encoded = msgspec.json.encode(result, enc_hook=str)
            options.json.write_bytes(msgspec.json.format(encoded) + b"\n")
    return 1 if any(comparison.failures for comparison in compared) else 0


def parse_work(text: str, seed: int) -> Workload:
    """From `32x128x64`.

    Raises:
        ValueError: it is nothing of the kind.
    """
    try:
        num_prompts, input_len, output_len = text.split("x")
        count = int(num_prompts)
    except ValueError:
        raise ValueError(f"--work {text}: write 32x128x64, requests x tokens in x out") from None
    return Workload(count, LengthRange.parse(input_len), LengthRange.parse(output_len), seed=seed)


def make_job(model: ModelFolder, engine_args: EngineArgs, workload: Workload) -> Job:
    """The same for all. The warm-up has the measured number and lengths of prompts, so that
    whatever an engine prepares by shape it has prepared, and other tokens: none are cached."""
    output_len = min(WARMUP_TOKENS, workload.output_len.high)
    warmup = dataclasses.replace(
        workload, output_len=LengthRange(output_len, output_len), seed=-1 - workload.seed
    )
    assert engine_args.threads is not None
    return Job(
        str(model.path),
        model.dtype,
        engine_args.threads,
        work_of(make_work(warmup, model.vocab_size)),
        work_of(make_work(workload, model.vocab_size)),
    )


def compare(
    contenders: list[Contender], job: Job, num_rounds: int, timeout_s: float, comparison: Comparison
) -> None:
    """Run all rounds. An engine that fails takes no further turn; the others go on."""
    for number in range(num_rounds):
        records: dict[str, list[RequestRecord]] = {}
        results: dict[str, dict[str, float]] = {}
        comparison.rounds.append(results)
        for contender in turns(contenders, number):
            name = contender.name
            if name in comparison.failures:
                continue
            turn = f"{comparison.work}, round {number + 1} of {num_rounds}, {name}"
            own_job = dataclasses.replace(job, options=contender.options)
            try:
                result = run_peer(contender.command, own_job, timeout_s)
            except PeerError as error:
                comparison.failures[name] = error
                print(f"{turn}: failed: {error}", file=sys.stderr)
                continue
            records[name] = records_of(job.work, result)
            results[name] = summarize(records[name], result.duration_s)
            results[name]["start_s"] = result.start_s
            comparison.versions[name] = result.version
            rate = results[name]["output_throughput"]
            print(f"{turn}: {rate:.1f} output tok/s", file=sys.stderr)
        if ours := records.get(OURS):
            comparison.num_equal = {name: count_equal(ours, of) for name, of in records.items()}


def report(
    comparison: Comparison, model: ModelFolder, engine_args: EngineArgs, num_requests: int
) -> None:
    """Print one work's results for people."""
    set_by_user = {
        option.name: value
        for option in dataclasses.fields(engine_args)
        if option.name not in ("model", "dtype", "threads")
        if (value := getattr(engine_args, option.name)) != option.default
    }
    print(
        f"\n{model.path.name}, {model.dtype}, threads: {engine_args.threads}, work: "
        f"{comparison.work}; medians over rounds: {len(comparison.rounds)}"
    )
    if set_by_user:
        options = " ".join(f"{name}={value}" for name, value in set_by_user.items())
        print(f"{OURS} with {options}")
    print(comparison_table(comparison.rounds, list(comparison.versions), OURS))
    # Rounding differs between engines, and only here does it not decide about tokens.
    if model.dtype == "float32" and OURS in comparison.num_equal:
        equal = ", ".join(
            f"{name} {count}" for name, count in comparison.num_equal.items() if name != OURS
        )
        print(f"Of {num_requests} requests, the same tokens as {OURS}: {equal}")
    for name, error in comparison.failures.items():
        log = "".join(f"\n  {line}" for line in error.log.splitlines())
        print(f"{name} failed: {error}{log}", file=sys.stderr)


def as_json(
    options: Options,
    peers: Peers,
    engine_args: EngineArgs,
    model: ModelFolder,
    compared: list[Comparison],
) -> dict[str, Any]:
    """The result for programs. Ratios are of Footplate to each of the others."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "model": dataclasses.asdict(model),
        "options": dataclasses.asdict(options) | dataclasses.asdict(peers),
        "engine_args": dataclasses.asdict(engine_args),
        "works": [
            {
                "work": comparison.work,
                "versions": comparison.versions,
                "rounds": comparison.rounds,
                "medians": {name: medians(comparison.rounds, name) for name in comparison.versions},
                "ratios": {
                    name: ratios(comparison.rounds, OURS, name)
                    for name in comparison.versions
                    if name != OURS
                },
                "num_equal": comparison.num_equal,
                "failures": {name: str(error) for name, error in comparison.failures.items()},
            }
            for comparison in compared
        ],
    }


if __name__ == "__main__":
    try:
        sys.exit(app())
    except (FootplateError, ValueError) as error:
        sys.exit(f"compare.py: {error}")
