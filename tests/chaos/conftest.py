"""What every scenario of a fault must leave behind: nothing.

    pytest tests/chaos                the fast ones, which the default run has as well
    pytest -m chaos                   the others
    scripts/test                      everything

One module for each group of faults. A scenario gets its engines from the `ledger`, which compares
what there is afterwards with what there was before: requests and blocks in the core; tasks,
threads, file descriptors, memory and children of this process; files of its sockets.
"""

import asyncio
import gc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from footplate.backend.fail_points import VARIABLE
from footplate.frontend import AsyncLLMEngine, EngineArgs, Restart, SamplingParams
from footplate.protocol import links

from .oracle import expected_tokens

PATIENCE_S = 30.0
STREAM_TOKENS = 150
# What an allocator keeps, and what a scenario imports for the first time.
MEMORY_TOLERANCE = 0.05
MEMORY_TOLERANCE_BYTES = 8 * 2**20


def in_time(condition: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Whether a condition comes true before a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@dataclass(frozen=True)
class Books:
    """What this process has."""

    tasks: int
    threads: list[str]
    descriptors: int
    children: int

    @classmethod
    def now(cls) -> "Books":
        return cls(
            tasks=len(asyncio.all_tasks()),
            threads=sorted(
                t.name for t in threading.enumerate() if not t.name.startswith("asyncio")
            ),
            descriptors=len(os.listdir("/proc/self/fd")),
            children=len(psutil.Process().children(recursive=True)),
        )


@dataclass
class Ledger:
    """Owns what a scenario starts, and the books of before.

    Attributes:
        folder: in which engines make their private ones.
        restarts: of all engines of the scenario.
    """

    folder: Path
    environment: pytest.MonkeyPatch
    restarts: list[Restart] = field(default_factory=list)

    def fail(self, rules: str) -> None:
        """Let cores that start from now on fail by these rules; by none if there are none."""
        if rules:
            self.environment.setenv(VARIABLE, rules)
        else:
            self.environment.delenv(VARIABLE, raising=False)

    @asynccontextmanager
    async def engine(self, rules: str = "", **args: Any) -> AsyncIterator[AsyncLLMEngine]:
        """An engine with the fake model. At the end its core must be empty.

        Args:
            rules: by which its first core fails; those that take its place are sound.
        """
        self.fail(rules)
        given = EngineArgs(**{"model": "fake", "log_level": "ERROR", "max_restarts": 50, **args})
        engine = AsyncLLMEngine.from_engine_args(given, on_restart=self.restarts.append)
        async with engine:
            self.fail("")
            yield engine
            async with asyncio.timeout(PATIENCE_S):
                stats, limits = await engine.get_stats(), await engine.get_scheduler_config()
            assert (stats.num_running, stats.num_waiting) == (0, 0), stats
            assert stats.num_free_blocks == limits.num_kv_blocks, stats


@pytest.fixture(scope="session")
def warm() -> None:
    """Import all that an engine needs, so that it is nobody's growth."""

    async def use() -> None:
        async with AsyncLLMEngine.from_engine_args(EngineArgs(model="fake")) as engine:
            async for _ in engine.generate("warm", SamplingParams(stop=["x"], logprobs=1)):
                pass

    asyncio.run(use())


@pytest.fixture
async def ledger(warm: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ledger]:
    """Engines for a scenario, and the comparison at its end."""
    folder = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    monkeypatch.setattr(links, "_temp_base", lambda: folder)
    gc.collect()
    before, memory = Books.now(), psutil.Process().memory_info().rss
    yield Ledger(folder, monkeypatch)
    await asyncio.sleep(0)  # callbacks of what has just been closed
    gc.collect()
    after = Books.now()
    if after != before:
        # Threads of the operating system and children end a little later than they are told to.
        await asyncio.to_thread(in_time, lambda: psutil.Process().num_threads() <= 3, 1.0)
        after = Books.now()
    assert after == before
    grown = psutil.Process().memory_info().rss - memory
    assert grown < MEMORY_TOLERANCE * memory + MEMORY_TOLERANCE_BYTES, f"{grown} bytes"
    assert os.listdir(folder) == []
    shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for sockets of programs that a scenario starts."""
    path = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


# ---- streams, and what they must hold


def prompt_of(number: int) -> list[int]:
    """Prompts of several lengths, no two of which begin alike."""
    return [30 + number] * (1 + 37 * (number % 5))


async def exact(
    engine: AsyncLLMEngine, number: int, count: int = STREAM_TOKENS, prompt: list[int] | None = None
) -> None:
    """One stream, token by token as it must be; greedy and sampled ones in turn."""
    prompt = prompt_of(number) if prompt is None else prompt
    temperature = float(number % 2)
    params = SamplingParams(
        temperature=temperature, seed=number, max_tokens=count, detokenize=False
    )
    got: list[int] = []
    async for output in engine.generate(prompt, params):
        now = output.outputs[0].token_ids
        assert now[: len(got)] == got, "an output took back what another had said"
        got = now
    assert got == expected_tokens(prompt, count, seed=number, temperature=temperature)


async def all_exact(engine: AsyncLLMEngine, num_streams: int, count: int = STREAM_TOKENS) -> None:
    """So many streams at once, each as it must be."""
    async with asyncio.timeout(2 * PATIENCE_S):
        await asyncio.gather(*(exact(engine, number, count) for number in range(num_streams)))
