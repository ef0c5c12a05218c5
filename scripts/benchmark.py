#!/usr/bin/env python3
"""Measure throughput and latency of the whole path: client, sockets, engine core, model.

    scripts/benchmark.py --model demo --num-prompts 64
    scripts/benchmark.py --random-model llama-160m --input-len 128 --output-len 64:256 \\
        --request-rate 2 --json result.json
    scripts/benchmark.py --random-model llama-160m --num-prompts 32 --peer transformers

Without --request-rate all prompts are there at the start: the result is a throughput, and its
latencies are mostly waiting. With it, arrivals are open-loop, and latencies mean something.
Option and result names are those of `vllm bench serve` where it has them.
"""

import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import uvloop
from cyclopts import App, Parameter
from tqdm import tqdm

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams
from footplate.frontend.benchmark.driver import Run, run_work
from footplate.frontend.benchmark.report import client_verdict, environment, num_cores, table
from footplate.frontend.benchmark.summary import RequestRecord, count_equal, summarize
from footplate.frontend.benchmark.workload import LengthRange, WorkItem, Workload, make_work
from footplate.protocol.errors import FootplateError
from footplate.protocol.messages import ModelFacts, Stats
from peer import Job
from peer_process import SCRIPTS, PeerError, peer_command, records_of, run_peer, work_of

# Will not come up in random text, and so has to be looked for in all of it.
STOP_STRINGS = ["\N{SNOWMAN} never \N{COMET}", "\n\nThe End of the Benchmark"]

app = App(name="benchmark.py", help=__doc__, help_format="plaintext")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    num_prompts: int = 100
    """How many requests."""

    input_len: str = "128"
    """Tokens per prompt, behind the shared prefix: 128, or 64:256 for a uniform range."""

    output_len: str = "128"
    """Tokens per output, as for input-len."""

    prefix_len: int = 0
    """Tokens that all prompts begin with."""

    request_rate: float = math.inf
    """Requests per second; all at once if not given."""

    burstiness: float = 1.0
    """1 is a Poisson process, less is burstier, more is steadier."""

    max_concurrency: int | None = None
    """Most requests at once; the others wait in the client, unsent and untimed."""

    temperature: float = 0.0
    """0 is greedy decoding."""

    top_p: float = 1.0
    """As in SamplingParams."""

    top_k: int = 0
    """As in SamplingParams."""

    text: bool = False
    """Turn output into text and look for stop strings, as an application does."""

    num_warmups: int = 1
    """Requests sent, and forgotten, before the clock starts."""

    seed: int = 0
    """Of prompts, lengths, arrivals and sampling."""

    connect: str | None = None
    """Address of a launched engine; one is started if not given."""

    random_model: Literal["llama-tiny", "llama-160m", "qwen3-0.6b"] | None = None
    """A model of this shape with random weights, made once; instead of --model."""

    peer: Literal["transformers"] | None = None
    """Do the same work with this as well, afterwards, in a process of its own."""

    peer_batch_size: int | None = None
    """Requests per batch of the peer; max-concurrency, or else up to 32, if not given."""

    json: Path | None = None
    """Write the result here."""

    save_detailed: bool = False
    """Include the latencies and tokens of every request in the JSON file."""

    @property
    def workload(self) -> Workload:
        """The part that says what is sent."""
        return Workload(
            self.num_prompts,
            LengthRange.parse(self.input_len),
            LengthRange.parse(self.output_len),
            self.prefix_len,
            self.request_rate,
            self.burstiness,
            self.seed,
        )

    @property
    def sampling_params(self) -> SamplingParams:
        """For all requests."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            ignore_eos=True,
            detokenize=self.text,
            stop=STOP_STRINGS if self.text else (),
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine, measured."""

    run: Run
    work: list[WorkItem]
    model: ModelFacts
    stats: Stats
    start_s: float


@app.default
def benchmark(
    options: Options = Options(),
    engine_args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(),  # noqa: B008
) -> int:
    """Measure throughput and latency of the whole path: client, sockets, engine core, model."""
    if options.peer and not math.isinf(options.request_rate):
        raise ValueError("--peer has no arrivals over time: leave --request-rate away")
    if options.random_model:
        folder = make_random_model(options.random_model, engine_args.dtype)
        engine_args = dataclasses.replace(engine_args, model=folder)
    where = environment()  # before the run, so that the load average is not our own
    ours = uvloop.run(measure(options, engine_args))
    columns = {"footplate": summarize(ours.run.records, ours.run.duration_s)}
    equal: int | None = None
    if options.peer:
        theirs, duration = do_with_peer(options, engine_args, ours)
        columns[options.peer] = summarize(theirs, duration)
        if options.temperature == 0 and ours.model.dtype == "float32":
            equal = count_equal(ours.run.records, theirs)
    if options.json:
        result = as_json(options, ours, columns, equal) | {"environment": where}
        encoded = msgspec.json.encode(result, enc_hook=str)
        options.json.write_bytes(msgspec.json.format(encoded) + b"\n")
    report(options, ours, columns, equal)
    return 1 if columns["footplate"]["failed"] else 0


async def measure(options: Options, engine_args: EngineArgs) -> Measurement:
    """Start or attach to an engine, warm it up, and run the workload."""
    if options.connect:
        engine = AsyncLLMEngine.connect(options.connect)
    else:
        engine = AsyncLLMEngine.from_engine_args(engine_args)
    since = time.perf_counter()
    async with engine:
        start_s = time.perf_counter() - since
        model = await engine.get_model_config()
        if options.workload.max_len > model.max_model_len:
            raise ValueError(
                f"prompt and output are up to {options.workload.max_len} tokens together, the "
                f"model's limit is {model.max_model_len}: use shorter ones"
            )
        params = options.sampling_params
        if options.text:
            await engine.get_tokenizer()  # loading it is no part of any latency
        if options.num_warmups:
            await run_work(engine, warmup_work(options, model.vocab_size), params)
        work = make_work(options.workload, model.vocab_size)
        with tqdm(total=len(work), unit="request", disable=None) as bar:
            run = await run_work(
                engine,
                work,
                params,
                max_concurrency=options.max_concurrency,
                on_done=lambda record: bar.update() and None,
            )
        return Measurement(run, work, model, await engine.get_stats(), start_s)


def warmup_work(options: Options, vocab_size: int) -> list[WorkItem]:
    """Prompts of the measured size, other than the measured ones: no prefix is cached for them."""
    workload = dataclasses.replace(
        options.workload,
        num_prompts=options.num_warmups,
        output_len=LengthRange(4, 4),
        request_rate=math.inf,
        seed=-1 - options.seed,
    )
    return make_work(workload, vocab_size)


def make_random_model(shape: str, dtype: str, *, has_tokenizer: bool = False) -> str:
    """Return the folder. In a process of its own: this one, the client, never imports torch."""
    command = [sys.executable, str(SCRIPTS / "random_model.py"), shape]
    if dtype != "auto":
        command += ["--dtype", dtype]
    if has_tokenizer:
        command.append("--tokenizer")
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.strip()


def do_with_peer(
    options: Options, engine_args: EngineArgs, ours: Measurement
) -> tuple[list[RequestRecord], float]:
    """Do the same work elsewhere; return its records and how long all of it took."""
    if ours.model.model == "fake":
        raise ValueError("--peer needs a model with weights")
    assert options.peer
    # "demo" is a name of ours; its folder is where its tokenizer is.
    is_folder = Path(ours.model.model).is_dir()
    work = work_of(ours.work)
    job = Job(
        model=ours.model.model if is_folder else ours.model.tokenizer,
        dtype=ours.model.dtype,
        threads=engine_args.threads or num_cores(),
        warmup=work_of(warmup_work(options, ours.model.vocab_size)),
        work=work,
        options={
            "batch_size": options.peer_batch_size
            or options.max_concurrency
            or min(32, options.num_prompts),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        },
    )
    result = run_peer(peer_command(options.peer), job)
    return records_of(work, result), result.duration_s


def report(
    options: Options,
    ours: Measurement,
    columns: dict[str, dict[str, float]],
    equal: int | None,
) -> None:
    """Print the result for people."""
    model = ours.model
    print(
        f"{model.model}: {model.architecture}, {model.dtype}, {model.device}, attention "
        f"{model.attention}; ready in {ours.start_s:.2f} s"
    )
    print(table(columns))
    print(
        f"Engine: {ours.stats.num_steps} steps, {ours.stats.num_preemptions} preemptions, prefix "
        f"cache hit {ours.stats.prefix_cache_hits} of {ours.stats.prefix_cache_queries} tokens "
        "since its start."
    )
    print(client_verdict(ours.run))
    if equal is not None:
        print(f"Tokens: {equal} of {options.num_prompts} requests equal to {options.peer}'s.")
    if failed := [record.error for record in ours.run.records if record.error]:
        print(f"{len(failed)} requests failed, the first with: {failed[0]}", file=sys.stderr)


def as_json(
    options: Options,
    ours: Measurement,
    columns: dict[str, dict[str, float]],
    equal: int | None,
) -> dict[str, Any]:
    """The result for programs, under vLLM's keys; what vLLM has no key for is nested."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "footplate",
        "model_id": ours.model.model,
        "tokenizer_id": ours.model.tokenizer,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **columns["footplate"],
        "seed": options.seed,
        "options": dataclasses.asdict(options) | {"request_rate": str(options.request_rate)},
        "engine": {
            "model": msgspec.structs.asdict(ours.model),
            "start_s": ours.start_s,
            "stats": msgspec.structs.asdict(ours.stats),
        },
        "client": {
            "event_loop_lag_ms": ours.run.loop_lag_ms,
            "cpu_share": ours.run.client_cpu_share,
            "was_bottleneck": ours.run.client_was_bottleneck,
        },
    }
    if options.peer:
        result["peer"] = {"backend": options.peer, **columns[options.peer], "num_equal": equal}
    if options.save_detailed:
        result |= _detailed(ours.run.records)
    return result


def _detailed(records: Sequence[RequestRecord]) -> dict[str, Any]:
    return {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [len(record.token_ids) for record in records],
        "ttfts": [record.ttft_s if record.moments else None for record in records],
        "itls": [record.itls_s for record in records],
        "errors": [record.error for record in records],
        "generated_token_ids": [record.token_ids for record in records],
    }


if __name__ == "__main__":
    try:
        sys.exit(app())
    except (FootplateError, PeerError, ValueError) as error:
        sys.exit(f"benchmark.py: {error}")
