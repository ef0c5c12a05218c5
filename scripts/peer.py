"""What an engine is asked to do in a comparison, and what it says of it.

A peer is a program of one file that does a `Job` with one engine: it reads the job as JSON on
standard input and writes a `Result` as JSON on standard output. It is started by the Python of its
engine's environment, so that packages, threads and memory are that engine's alone; hence nothing
here needs more than the standard library.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Work:
    """Requests that are all there at the start. Decoding is greedy, and no token ends an output.

    Attributes:
        max_tokens: of each request; its output has exactly so many.
    """

    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def requests(self) -> list[tuple[list[int], int]]:
        """Prompts with their max_tokens."""
        return list(zip(self.prompts, self.max_tokens, strict=True))

    @property
    def lengths(self) -> list[int]:
        """Of each prompt and its output together."""
        return [len(prompt) + max_tokens for prompt, max_tokens in self.requests]


@dataclass(frozen=True)
class Job:
    """One start of one engine.

    Attributes:
        model: folder with config.json and safetensors; an engine with files of its own ignores it.
        dtype: a name in torch, e.g. "bfloat16".
        warmup: done and forgotten before `work`, which it resembles.
        options: what only this peer understands; its file says what that is.
        started_at: when the process was started, in seconds since the epoch.
    """

    model: str
    dtype: str
    threads: int
    warmup: Work
    work: Work
    options: dict[str, Any] = field(default_factory=dict)
    started_at: float = 0.0


@dataclass
class Output:
    """One request: its tokens, and when each output of its stream came.

    Attributes:
        token_ids: -1 is a token that the engine counts and does not name.
        moments: seconds on the clock of `time.perf_counter`, in a `Result` since the start of the
            work. One may stand for several tokens. Empty if the engine does not tell.
    """

    token_ids: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What came of a job.

    Attributes:
        outputs: one per request, in order.
        duration_s: from the start of the work to its last token.
        start_s: from the start of the process to an engine that takes requests.
        version: of the engine.
    """

    outputs: list[Output]
    duration_s: float
    start_s: float
    version: str


@dataclass(frozen=True)
class Engine:
    """A started engine: its version, and how it does work."""

    version: str
    generate: Callable[[Work], list[Output]]


# Starts the engine that a job asks for, and stops it in the end.
Start = Callable[[Job], AbstractContextManager[Engine]]


def run(job: Job, start: Start) -> Result:
    """Start the engine, warm it up, and let it do the work."""
    with start(job) as engine:
        start_s = time.time() - job.started_at
        if job.warmup.prompts:
            engine.generate(job.warmup)
        since = time.perf_counter()
        outputs = engine.generate(job.work)
        done = time.perf_counter()
        until = max((output.moments[-1] for output in outputs if output.moments), default=done)
    for output in outputs:
        output.moments = [moment - since for moment in output.moments]
    return Result(outputs, until - since, start_s, engine.version)


def main(start: Start) -> None:
    """Do the job on standard input."""
    # Engines print what they please: standard output is kept for the result alone. The copy is
    # not inherited, so a process that outlives this one does not keep the reader waiting either.
    result_file = os.dup(1)
    os.dup2(2, 1)
    result = run(_read_job(sys.stdin.buffer.read()), start)
    with os.fdopen(result_file, "w") as file:
        json.dump(asdict(result), file)


def _read_job(data: bytes) -> Job:
    fields = json.loads(data)
    return Job(**fields | {name: Work(**fields[name]) for name in ("warmup", "work")})
