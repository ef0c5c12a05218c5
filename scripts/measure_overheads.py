#!/usr/bin/env python3
"""Measure what Footplate costs beside the model: start, round trip, held streams, idleness.

scripts/measure_overheads.py                      # fake model
scripts/measure_overheads.py --model demo --idle-seconds 60
"""

import argparse
import asyncio
import gc
import resource
import statistics
import sys
import time
from pathlib import Path

import uvloop

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestStream, SamplingParams

PROMPT = [20, 21, 22]
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)


def cpu_seconds(process_id: int | str) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def resident_bytes() -> int:
    """Memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


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


async def run(args: argparse.Namespace) -> None:
    """All measurements, one after another."""
    since = time.perf_counter()
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model=args.model)) as engine:
        ready = time.perf_counter() - since
        async for _ in engine.generate(PROMPT, ONE_TOKEN):
            pass
        first = time.perf_counter() - since
        phases = ", ".join(f"{name} {s:.2f}" for name, s in engine.start_phases.items())
        print(f"start: ready after {ready:.2f} s, first token after {first:.2f} s ({phases})")
        await measure_round_trips(engine, args.round_trips)
        if args.streams:
            await measure_held_streams(engine, args.streams)
        await measure_idle(engine, args.idle_seconds)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--round-trips", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    uvloop.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
