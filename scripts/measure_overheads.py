#!/usr/bin/env python3
"""Measure what Footplate costs beside the model: start, round trip, held streams, idleness.

scripts/measure_overheads.py                                    fake model
scripts/measure_overheads.py --model demo --idle-seconds 60     as any engine argument
"""

import asyncio
import gc
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated

import uvloop
from cyclopts import App, Parameter

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestStream, SamplingParams

DEFAULT = EngineArgs(model="fake")
PROMPT = [20, 21, 22]
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)


def cpu_seconds(process_id: int | str) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def resident_bytes() -> int:
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes(process_id: int) -> int:
    """The most memory that a process has held so far, mapped files included (Linux)."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("the kernel does not tell")


async def measure_round_trips(engine: AsyncLLMEngine, count: int) -> None:
    """One token at a time from an idle engine: client, core, client."""
    seconds = []
    for _ in range(count):
        since = time.perf_counter()
        async for _ in engine.generate(PROMPT, ONE_TOKEN):
            pass
        seconds.append(time.perf_counter() - since)
    cuts = statistics.quantiles(seconds, n=100)
    print(f"idle round trip: median {1e3 * cuts[49]:.2f} ms, p99 {1e3 * cuts[98]:.2f} ms")


async def measure_held_streams(engine: AsyncLLMEngine, count: int) -> None:
    """Memory of streams that are open and quiet: their requests wait for a slot."""
    limits = await engine.get_scheduler_config()
    model = await engine.get_model_config()
    long = SamplingParams(max_tokens=model.max_model_len - 8, detokenize=False)
    busy = [await engine.add_request(None, PROMPT, long) for _ in range(limits.max_num_seqs)]
    gc.collect()
    before = resident_bytes()
    held: list[RequestStream] = [
        await engine.add_request(None, list(PROMPT), ONE_TOKEN) for _ in range(count)
    ]
    gc.collect()
    each = (resident_bytes() - before) / count
    print(f"{count} streams held: {each / 1024:.2f} KiB each in the client, prompt included")
    for stream in (*busy, *held):
        stream.close()


async def measure_idle(engine: AsyncLLMEngine, seconds: float) -> None:
    """CPU time of both processes while nothing is asked of them."""
    core = engine.process_id
    assert core is not None
    await engine.get_stats()
    client_before, core_before = cpu_seconds("self"), cpu_seconds(core)
    await asyncio.sleep(seconds)
    client_ms = 1e3 * (cpu_seconds("self") - client_before)
    core_ms = 1e3 * (cpu_seconds(core) - core_before)
    print(f"idle for {seconds:g} s: client {client_ms:.0f} ms of CPU, core {core_ms:.0f} ms")


async def run(
    engine_args: EngineArgs, *, round_trips: int, streams: int, idle_seconds: float
) -> None:
    """All measurements, one after another."""
    since = time.perf_counter()
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        ready = time.perf_counter() - since
        async for _ in engine.generate(PROMPT, ONE_TOKEN):
            pass
        first = time.perf_counter() - since
        phases = ", ".join(f"{name} {s:.2f}" for name, s in engine.start_phases.items())
        print(f"start: ready after {ready:.2f} s, first token after {first:.2f} s ({phases})")
        assert engine.process_id is not None
        print(f"peak memory of the core so far: {peak_bytes(engine.process_id) / 1e6:.0f} MB")
        await measure_round_trips(engine, round_trips)
        if streams:
            await measure_held_streams(engine, streams)
        await measure_idle(engine, idle_seconds)


app = App(name="measure_overheads.py", help=__doc__, help_format="plaintext")


@app.default
def main(
    engine_args: Annotated[EngineArgs, Parameter(name="*")] = DEFAULT,
    *,
    round_trips: int = 1000,
    streams: int = 10_000,
    idle_seconds: float = 10.0,
) -> None:
    """Print one line per measurement.

    Args:
        engine_args: of the engine that is started.
        round_trips: how many, for the median and the 99th percentile.
        streams: to hold at once; none with 0.
        idle_seconds: to watch both processes do nothing.
    """
    uvloop.run(
        run(engine_args, round_trips=round_trips, streams=streams, idle_seconds=idle_seconds)
    )


if __name__ == "__main__":
    app()
