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
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from cyclopts import App, Parameter

from benchmark import make_random_model
from footplate.frontend import EngineArgs
from footplate.frontend.benchmark.comparison import comparison_table, medians, ratios, turns
from footplate.frontend.benchmark.report import environment, num_cores
from footplate.frontend.benchmark.summary import RequestRecord, count_equal, summarize
from footplate.frontend.benchmark.workload import LengthRange, Workload, make_work
from footplate.protocol.errors import FootplateError
from peer import Job
from peer_process import (
    SCRIPTS,
    PeerError,
    peer_command,
    records_of,
    require_package,
    run_peer,
    work_of,
)

OURS = "footplate"
WARMUP_TOKENS = 4
MAX_STATIC_BATCH = 32

# Given several times, they make a list; there is no option for an empty one.
Listed = Parameter(negative=())

app = App(name="compare.py", help=__doc__, help_format="plaintext")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and with what."""

    work: Annotated[tuple[str, ...], Listed] = ("1x128x128", "32x128x64")
    """Requests x tokens in x tokens out; lengths may be uniform ranges: 32x64:256x128. May be given
    several times."""

    rounds: int = 3
    """Turns of each engine at each work."""

    seed: int = 0
    """Of prompts and lengths."""

    random_model: Literal["llama-tiny", "llama-160m", "qwen3-0.6b"] | None = None
    """A model of this shape with random weights, made once; instead of --model FOLDER."""

    transformers: bool = False
    """Compare with transformers' `generate`, in static batches."""

    vllm_python: Path | None = None
    """Compare with vLLM: the Python of an environment that has it."""

    openvino_python: Path | None = None
    """Compare with OpenVINO GenAI: the Python of an environment that has it."""

    openvino_weights: Annotated[tuple[Literal["fp", "int8", "int4"], ...], Listed] = ()
    """As what the weights are kept: as they are (fp, if not given), or quantised. May be given
    several times. The model is converted once, into the user's cache folder, by optimum-intel in
    that environment."""

    openvino_model: Path | None = None
    """A converted model, instead of --openvino-weights."""

    openvino_property: Annotated[tuple[str, ...], Listed] = ()
    """NAME=VALUE for OpenVINO's CPU device, such as KV_CACHE_PRECISION=bf16. May be given several
    times."""

    llama_server: Path | None = None
    """Compare with llama.cpp: its server program, along with --gguf."""

    gguf: Annotated[tuple[Path, ...], Listed] = ()
    """The model for llama.cpp, its weights in whatever format the file has them. May be given
    several times."""

    timeout_s: float = 1800.0
    """Longest turn."""

    json: Path | None = None
    """Write the results of all rounds here."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What peers and prompts need to know of a model."""

    path: Path
    vocab_size: int
    max_len: int
    dtype: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """From its config.json.

        Raises:
            ValueError: there is none, or it is no language model's.
        """
        try:
            config = msgspec.json.decode((path / "config.json").read_bytes())
            text = config.get("text_config", config)
            dtype = text.get("dtype") or config.get("dtype") or config.get("torch_dtype")
            return cls(
                path.resolve(),
                text["vocab_size"],
                text["max_position_embeddings"],
                dtype or "float32",
            )
        except OSError:
            raise ValueError(
                f"{path} is no folder with a config.json: give --model FOLDER or --random-model"
            ) from None
        except (msgspec.DecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path / 'config.json'} is no language model's: {error}") from None


@dataclass(frozen=True)
class Contender:
    """An engine as this script starts it."""

    name: str
    command: list[str]
    options: dict[str, Any]


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
    engine_args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(),  # noqa: B008
) -> int:
    """Compare Footplate with other engines: the same work, the same threads, in turn."""
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: must be at least 1")
    workloads = {text: parse_work(text, options.seed) for text in options.work}
    check_peers(options)
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
    contenders = all_contenders(options, engine_args, model)
    compared = []
    for text, workload in workloads.items():
        job = make_job(model, engine_args, workload)
        comparison = Comparison(text)
        compared.append(comparison)
        compare(contenders, job, options.rounds, options.timeout_s, comparison)
        report(comparison, model, engine_args, workload.num_prompts)
        if options.json:  # what was measured is kept, whatever happens next
            result = as_json(options, engine_args, model, compared) | {"environment": where}
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


def check_peers(options: Options) -> None:
    """Whatever is missing is said before anything is measured.

    Raises:
        ValueError: it is.
    """
    if options.vllm_python:
        require_package(options.vllm_python, "vllm", "vllm")
    if options.openvino_python:
        require_package(options.openvino_python, "openvino_genai", "openvino-genai")
        if not options.openvino_model:
            require_package(options.openvino_python, "optimum", "'optimum-intel[nncf]'")
        elif options.openvino_weights:
            raise ValueError("--openvino-model has its weights: leave --openvino-weights away")
        elif not (options.openvino_model / "openvino_model.xml").is_file():
            raise ValueError(f"{options.openvino_model} is no folder with an openvino_model.xml")
    elif options.openvino_model or options.openvino_weights or options.openvino_property:
        raise ValueError("OpenVINO needs --openvino-python")
    for text in options.openvino_property:
        if "=" not in text:
            raise ValueError(f"--openvino-property {text}: write NAME=VALUE")
    if bool(options.llama_server) != bool(options.gguf):
        raise ValueError("llama.cpp needs both --llama-server and --gguf")
    if options.llama_server and not shutil.which(options.llama_server):
        raise ValueError(f"--llama-server {options.llama_server}: no such program")
    for file in options.gguf:
        if not file.is_file():
            raise ValueError(f"--gguf {file}: no such file")
    if not (options.transformers or options.vllm_python or options.openvino_python or options.gguf):
        raise ValueError(
            "nothing to compare with: give --transformers, --vllm-python, --openvino-python, or "
            "--llama-server and --gguf"
        )


def all_contenders(
    options: Options, engine_args: EngineArgs, model: ModelFolder
) -> list[Contender]:
    """Footplate and the engines that were asked for."""
    ours = dataclasses.asdict(engine_args) | {"model": str(model.path)}
    found = [Contender(OURS, peer_command("footplate"), {"engine_args": ours})]
    if options.transformers:
        batching = {"batch_size": MAX_STATIC_BATCH}
        found.append(Contender("transformers", peer_command("transformers"), batching))
    # Of the engines that have one: how much of a prompt delays everybody's next token.
    budget = {"max_num_batched_tokens": engine_args.max_num_batched_tokens}
    if options.vllm_python:
        found.append(Contender("vllm", peer_command("vllm", str(options.vllm_python)), budget))
    if options.openvino_python:
        command = peer_command("openvino", str(options.openvino_python))
        properties = dict(text.split("=", 1) for text in options.openvino_property)
        for name, ir in openvino_models(options, model).items():
            own = {"ir": str(ir), "properties": properties}
            found.append(Contender(name, command, budget | own))
    for file in options.gguf:
        name = "llama.cpp" if len(options.gguf) == 1 else f"llama.cpp {file.stem}"
        files = {"server": str(options.llama_server), "gguf": str(file.resolve())}
        found.append(Contender(name, peer_command("llama_server"), files))
    return found


def openvino_models(options: Options, model: ModelFolder) -> dict[str, Path]:
    """By the engine's name, the folders of OpenVINO's form of the model, made now if need be."""
    if options.openvino_model:
        return {"openvino": options.openvino_model.resolve()}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "footplate/openvino"
    # Another model may be put in the same place: its weights are then of another time.
    weights = sorted(model.path.glob("*.safetensors"))
    stamp = repr([(str(file), file.stat().st_mtime_ns) for file in weights])
    key = f"{model.path.name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    folders = {}
    for form in options.openvino_weights or ("fp",):
        folder = folders[f"openvino {form}"] = cache / f"{key}-{form}"
        if not folder.exists():
            print(f"Converting {model.path.name} for OpenVINO, {form}", file=sys.stderr)
            assert options.openvino_python
            command = [options.openvino_python, SCRIPTS / "openvino_convert.py"]
            if subprocess.run([*command, model.path, form, folder], stdout=sys.stderr).returncode:
                raise ValueError(f"{model.path} could not be converted for OpenVINO, see above")
    return folders


def make_job(model: ModelFolder, engine_args: EngineArgs, workload: Workload) -> Job:
    """The same for all. The warm-up has the measured number and lengths of prompts, so that
    whatever an engine prepares by shape it has prepared, and other tokens: none are cached."""
    warmup = dataclasses.replace(
        workload, output_len=LengthRange(WARMUP_TOKENS, WARMUP_TOKENS), seed=-1 - workload.seed
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
    requests, tokens_in, tokens_out = comparison.work.split("x")
    print(
        f"\n{model.path.name}, {model.dtype}, {engine_args.threads} threads; {requests} requests, "
        f"{tokens_in} tokens in, {tokens_out} out; medians of {len(comparison.rounds)} rounds"
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
    engine_args: EngineArgs,
    model: ModelFolder,
    compared: list[Comparison],
) -> dict[str, Any]:
    """The result for programs. Ratios are of Footplate to each of the others."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "model": dataclasses.asdict(model),
        "options": dataclasses.asdict(options),
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
