"""Stream sixty-four answers, kill the engine core in the middle, and count what that has cost."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from footplate.frontend import AsyncLLMEngine, EngineArgs, Restart, SamplingParams

NUM_STREAMS = 64
MAX_TOKENS = 60
SUBJECTS = ("function", "argument", "method", "list", "string", "module", "class", "value")

console = Console(highlight=False)


@dataclass
class Received:
    """What one stream has brought, piece by piece."""

    pieces: list[list[int]] = field(default_factory=list)
    text: str = ""
    is_over: bool = False

    @property
    def token_ids(self) -> list[int]:
        """All of it."""
        return [token_id for piece in self.pieces for token_id in piece]


@dataclass
class Toll:
    """What a run has cost, compared with one that nobody disturbed; in tokens."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0

    def count(self, received: Received, expected: Received) -> None:
        """Add one stream."""
        difference = len(received.token_ids) - len(expected.token_ids)
        self.lost += max(0, -difference)
        self.doubled += max(0, difference)
        pairs = zip(received.token_ids, expected.token_ids, strict=False)
        self.changed += sum(a != b for a, b in pairs)
        self.changed += received.text != expected.text


async def follow(engine: AsyncLLMEngine, index: int, received: Received) -> None:
    """One stream, from beginning to end; every second one is sampled."""
    params = SamplingParams(
        temperature=0.8 * (index % 2),
        seed=index,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        stream_interval=1,
    )
    subject = SUBJECTS[index % len(SUBJECTS)]
    seen = 0
    async for output in engine.generate(f"{index}. The {subject} returns", params):
        completion = output.outputs[0]
        received.pieces.append(completion.token_ids[seen:])
        seen = len(completion.token_ids)
        received.text = completion.text
    received.is_over = True


async def run_all(engine: AsyncLLMEngine, title: str, *, kills: bool) -> list[Received]:
    """Sixty-four streams at once; with `kills`, the core is killed when half of their tokens have
    come."""
    received = [Received() for _ in range(NUM_STREAMS)]
    tasks = [
        asyncio.create_task(follow(engine, index, each)) for index, each in enumerate(received)
    ]
    total, killed = NUM_STREAMS * MAX_TOKENS, None if kills else 0
    with Live(console=console, refresh_per_second=20) as live:
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.01)
            count = sum(len(each.token_ids) for each in received)
            live.update(_bar(title, count, total))
            if killed is None and count >= total / 2 and engine.process_id is not None:
                killed = engine.process_id
                os.kill(killed, signal.SIGKILL)
    console.print()
    if kills:
        console.print(f"  half-way, the engine core was killed: [bold]kill -9 {killed}[/bold]")
    await asyncio.gather(*tasks)
    return received


def _bar(title: str, count: int, total: int) -> Text:
    filled = round(40 * count / total)
    return Text(f"  {title:<12} {'█' * filled}{'░' * (40 - filled)} {count:5} tokens")


async def run(model: str) -> bool:
    """Run both, compare, print; whether nothing was lost, doubled or changed."""
    restarts: list[Restart] = []
    engine = AsyncLLMEngine.from_engine_args(EngineArgs(model=model), on_restart=restarts.append)
    async with engine:
        console.print(f"{NUM_STREAMS} streams of {MAX_TOKENS} tokens, twice, with the same seeds:")
        expected = await run_all(engine, "undisturbed", kills=False)
        since = time.perf_counter()
        received = await run_all(engine, "killed", kills=True)
        seconds = time.perf_counter() - since
        toll = Toll()
        for got, wanted in zip(received, expected, strict=True):
            toll.count(got, wanted)
        num_over = sum(each.is_over for each in received)
        replaced = ", ".join(
            f"engine core replaced in {restart.seconds:.2f} s, {restart.num_replayed} requests "
            "went on in it"
            for restart in restarts
        )
        console.print(f"  {replaced}")
        console.print(
            f"[bold]{num_over}/{NUM_STREAMS} streams went on to their end · lost {toll.lost} · "
            f"doubled {toll.doubled} · changed {toll.changed}[/bold] (tokens; {seconds:.1f} s)"
        )
    return bool(restarts) and num_over == NUM_STREAMS and toll == Toll()
