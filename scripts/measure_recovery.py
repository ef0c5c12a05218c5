#!/usr/bin/env python3
"""Kill the engine core in the middle of a stream, and measure when the stream goes on.

scripts/measure_recovery.py --model $(scripts/random_model.py llama-160m)
scripts/measure_recovery.py --model demo --kills 20 --cached-tokens 100000

Each kill is in an engine of its own: first without a standby, then with one. Beside the times
stands what the processes hold: memory that several of them have mapped counts in parts, one for
each of them (PSS), so that a sum counts it once.
"""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
import uvloop
from cyclopts import App, Parameter

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams

DEFAULT = EngineArgs(model="demo")
MIB = 2**20
STANDBY_IDLE_S = 2.0  # without using the CPU: then it has loaded
STANDBY_TIMEOUT_S = 300.0


def pss_bytes(process_id: int) -> int:
    """The proportional set size of a process (Linux)."""
    for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise OSError("the kernel does not tell")


async def find_standby(serving: int) -> int:
    """The standby's process, once it has loaded and does nothing any more."""
    deadline = time.monotonic() + STANDBY_TIMEOUT_S
    before = -1.0
    (server,) = psutil.Process().children()
    while time.monotonic() < deadline:
        standbys = [child for child in server.children() if child.pid != serving]
        cpu_s = sum(sum(child.cpu_times()[:2]) for child in standbys)
        if standbys and cpu_s == before:
            return int(standbys[0].pid)
        before = cpu_s
        await asyncio.sleep(STANDBY_IDLE_S)
    raise TimeoutError("there is no standby")


def prompts(num_tokens: int, length: int, vocab_size: int) -> Iterator[list[int]]:
    """Different ones, `num_tokens` in all."""
    for first in range(0, num_tokens, length):
        size = min(length, num_tokens - first)
        yield [(7919 * (first + i) + first) % vocab_size for i in range(size)]


async def fill_cache(engine: AsyncLLMEngine, num_tokens: int) -> None:
    """Compute so many prompt tokens; what they leave in the KV cache stays there."""
    model = await engine.get_model_config()
    one = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    for prompt in prompts(num_tokens, model.max_model_len - 1, model.vocab_size):
        async for _ in engine.generate(prompt, one):
            pass


async def measure_kill(
    args: EngineArgs, prompt_tokens: int, cached_tokens: int
) -> tuple[float, int, int]:
    """Seconds from the kill to the next token, PSS of the core with the fork server, and of its
    standby (or 0)."""
    async with AsyncLLMEngine(args) as engine:
        serving = engine.process_id
        assert serving is not None
        await fill_cache(engine, cached_tokens)
        model = await engine.get_model_config()
        standby = await find_standby(serving) if args.standby else None
        core_bytes = pss_bytes(serving) + pss_bytes(psutil.Process().children()[0].pid)
        standby_bytes = 0 if standby is None else pss_bytes(standby)
        params = SamplingParams(max_tokens=64, ignore_eos=True, temperature=0, detokenize=False)
        (prompt,) = prompts(prompt_tokens, prompt_tokens, model.vocab_size)
        stream = engine.generate(prompt, params)
        await anext(stream)
        os.kill(serving, signal.SIGKILL)
        killed = time.monotonic()
        at_kill = None
        async for output in stream:
            # What was on its way when the core died is no news of the next one.
            if at_kill is None and engine.process_id == serving:
                continue
            at_kill = time.monotonic() - killed
            assert output.outputs[0].token_ids
            break
        assert at_kill is not None, "the stream ended before the core did: raise max_tokens"
        await stream.aclose()
    return at_kill, core_bytes, standby_bytes


async def run(args: EngineArgs, kills: int, prompt_tokens: int, cached_tokens: int) -> None:
    """Measure and print."""
    alone = 0.0
    for standby in (False, True):
        engine_args = replace(args, standby=standby)
        results = [
            await measure_kill(engine_args, prompt_tokens, cached_tokens) for _ in range(kills)
        ]
        seconds = sorted(result[0] for result in results)
        core = statistics.mean(result[1] for result in results) / MIB
        both = core + statistics.mean(result[2] for result in results) / MIB
        alone = alone or core
        print(
            f"{'with' if standby else 'without'} a standby, {kills} kills: to the next token p50 "
            f"{statistics.median(seconds):.3f} s, p99 {seconds[round(0.99 * (kills - 1))]:.3f} s; "
            f"{both:.0f} MiB in all, {both / alone:.2f} x one core"
        )


app = App(name="measure_recovery.py")


@app.default
def main(
    args: Annotated[EngineArgs, Parameter(name="*")] = DEFAULT,
    *,
    kills: int = 10,
    prompt_tokens: int = 100,
    cached_tokens: int = 0,
) -> None:
    """Measure how long a stream stands still when its core is killed.

    Parameters
    ----------
    kills:
        Each way.
    prompt_tokens:
        Of the stream, to be computed again.
    cached_tokens:
        That the core has computed before, so that its KV cache is in use.
    """
    uvloop.run(run(args, kills, prompt_tokens, cached_tokens))


if __name__ == "__main__":
    app()
