#!/usr/bin/env python3
"""Compare beam search with transformers': are the outputs the same, and how long does it take?

    scripts/compare_beams.py --random-model llama-160m
    scripts/compare_beams.py --random-model qwen3-0.6b --beam-width 8 --max-tokens 64 --rounds 5

Prompts are random token ids, searched one after the other, and no token ends an output. Rounds are
taken in turn, each engine alone on the machine. In float32, so that rounding decides about tokens
only where two beams are as good as equal. Other options go to Footplate's engine.
"""

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import uvloop
from cyclopts import App, Parameter

from benchmark import make_random_model
from footplate.frontend import AsyncLLMEngine, EngineArgs
from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.benchmark.report import environment, num_cores
from footplate.frontend.benchmark.workload import LengthRange, Workload, make_work
from footplate.protocol.errors import FootplateError
from peer import Job, Work
from peer_process import PeerError, peer_command, run_peer

WARMUP_TOKENS = 4
DTYPE: Final = "float32"

app = App(name="compare_beams.py", help=__doc__, help_format="plaintext")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare."""

    random_model: Literal["llama-tiny", "llama-160m", "qwen3-0.6b"] | None = None
    """A model of this shape with random weights, made once; instead of --model FOLDER."""

    beam_width: int = 4
    """Beams, and outputs of each prompt."""

    max_tokens: int = 32
    """Tokens of each output."""

    length_penalty: float = 1.0
    """All outputs are of one length, so this changes scores and not their order."""

    num_prompts: int = 4
    """How many prompts."""

    input_len: int = 64
    """Tokens of each prompt."""

    rounds: int = 3
    """Turns of each engine."""

    seed: int = 0
    """Of the prompts."""

    timeout_s: float = 1800.0
    """Longest turn of transformers."""

    @property
    def params(self) -> BeamSearchParams:
        """For all prompts."""
        return BeamSearchParams(
            beam_width=self.beam_width,
            max_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            ignore_eos=True,
            detokenize=False,
        )

    def prompts(self, vocab_size: int, *, warmup: bool = False) -> list[list[int]]:
        """What is searched, or one prompt as long, of which no prefix is cached for the others."""
        workload = Workload(
            1 if warmup else self.num_prompts,
            LengthRange(self.input_len, self.input_len),
            LengthRange(self.max_tokens, self.max_tokens),
            seed=-1 - self.seed if warmup else self.seed,
        )
        return [item.prompt_token_ids for item in make_work(workload, vocab_size)]


@dataclass(frozen=True)
class Turn:
    """One engine's outputs of each prompt, best first, and how long all of them took."""

    outputs: list[list[list[int]]]
    duration_s: float


@app.default
def main(
    options: Options = Options(),
    engine_args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(),  # noqa: B008
) -> int:
    """Compare beam search with transformers'."""
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: must be at least 1")
    params = options.params  # is checked before anything is loaded
    model = engine_args.model
    if options.random_model:
        model = make_random_model(options.random_model, DTYPE)
    engine_args = dataclasses.replace(
        engine_args, model=model, dtype=DTYPE, threads=engine_args.threads or num_cores()
    )
    where = environment()  # before the rounds, so that the load average is not our own
    ours, theirs = [], []
    for number in range(options.rounds):
        turn, vocab_size, folder = uvloop.run(take_turn(options, params, engine_args))
        ours.append(turn)
        theirs.append(take_peers_turn(options, engine_args, folder, vocab_size))
        print(
            f"round {number + 1} of {options.rounds}: footplate {ours[-1].duration_s:.2f} s, "
            f"transformers {theirs[-1].duration_s:.2f} s",
            file=sys.stderr,
        )
    print(f"{where['cpu']}, threads: {engine_args.threads}, {model}, {DTYPE}")
    print(report(options, ours, theirs))
    return 0 if ours[0].outputs == theirs[0].outputs else 1


async def take_turn(
    options: Options, params: BeamSearchParams, engine_args: EngineArgs
) -> tuple[Turn, int, str]:
    """Footplate's turn; also the vocabulary's size and the model's folder."""
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        facts = await engine.get_model_config()
        for prompt in options.prompts(facts.vocab_size, warmup=True):
            await search(engine, prompt, params)
        prompts = options.prompts(facts.vocab_size)
        since = time.perf_counter()
        outputs = [await search(engine, prompt, params) for prompt in prompts]
        duration_s = time.perf_counter() - since
        # "demo" is a name of ours; its folder is where its tokenizer is.
        folder = facts.tokenizer if facts.model == "demo" else facts.model
        return Turn(outputs, duration_s), facts.vocab_size, folder


async def search(
    engine: AsyncLLMEngine, prompt: list[int], params: BeamSearchParams
) -> list[list[int]]:
    """All outputs of one prompt, best first."""
    async for found in engine.beam_search(prompt, params):
        return [output.token_ids for output in found.outputs]
    raise AssertionError("a search has one result")


def take_peers_turn(
    options: Options, engine_args: EngineArgs, folder: str, vocab_size: int
) -> Turn:
    """The same with transformers, in a process of its own."""
    assert engine_args.threads is not None
    width = options.beam_width
    job = Job(
        folder,
        DTYPE,
        engine_args.threads,
        work_of(options.prompts(vocab_size, warmup=True), width, WARMUP_TOKENS),
        work_of(options.prompts(vocab_size), width, options.max_tokens),
        {"beam_width": width, "length_penalty": options.length_penalty},
    )
    result = run_peer(peer_command("transformers_beam"), job, options.timeout_s)
    rows = [output.token_ids for output in result.outputs]
    outputs = [rows[first : first + width] for first in range(0, len(rows), width)]
    return Turn(outputs, result.duration_s)


def work_of(prompts: list[list[int]], beam_width: int, max_tokens: int) -> Work:
    """Every prompt once for each of its outputs."""
    repeated = [prompt for prompt in prompts for _ in range(beam_width)]
    return Work(repeated, [max_tokens] * len(repeated))


def report(options: Options, ours: list[Turn], theirs: list[Turn]) -> str:
    """For people. Tokens are those of the steps of a search, whatever its width."""
    pairs = list(zip(ours[0].outputs, theirs[0].outputs, strict=True))
    num_equal = sum(mine == other for pair in pairs for mine, other in zip(*pair, strict=True))
    num_outputs = options.num_prompts * options.beam_width
    num_steps = options.num_prompts * options.max_tokens
    seconds = [statistics.median(turn.duration_s for turn in turns) for turns in (ours, theirs)]
    ratio = statistics.median(
        other.duration_s / mine.duration_s for mine, other in zip(ours, theirs, strict=True)
    )
    lines = [
        f"{options.num_prompts} searches of width {options.beam_width}, {options.input_len} tokens "
        f"in, {options.max_tokens} out; medians over rounds: {len(ours)}",
        f"outputs that are the same, in the same place: {num_equal} of {num_outputs}",
    ]
    for name, duration_s in zip(("footplate", "transformers"), seconds, strict=True):
        per_step = 1e3 * duration_s / num_steps
        lines.append(f"{name:13} {duration_s:8.2f} s  {per_step:8.2f} ms per step")
    lines.append(f"footplate is faster by a factor of {ratio:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(app())
    except (FootplateError, PeerError, ValueError) as error:
        sys.exit(f"compare_beams.py: {error}")
