#!/usr/bin/env python3
"""Kill the engine core at random moments under load, and compare every stream with the same request
run undisturbed.

scripts/chaos.py                                     200 kills, fake model, 64 streams
scripts/chaos.py --model demo --kills 50 --standby
scripts/chaos.py --model 160m --kills 20             random weights in that shape; or a model folder
scripts/chaos.py --kill hang --seconds 60            or crash, stop, garbage, client

Faults: "core" is SIGKILL; "crash" a core that ends itself (segmentation fault, exit, exception);
"hang" one that computes for ever, or waits in C with the lock of the interpreter; "stop" is SIGSTOP
for up to two seconds; "garbage" sends bad frames to its socket; "client" kills another client of
the same core. Exit status 1 if anything was lost, doubled, changed or failed.
"""

import argparse
import asyncio
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from benchmark import make_random_model
from chaos_clients import kill_clients
from chaos_faults import FAIL_POINTS, KillWithSpare, Restarts, make_fault
from chaos_load import Load, make_templates
from footplate.frontend import AsyncLLMEngine, EngineArgs

FAULTS = ("core", "crash", "hang", "stop", "garbage", "client")
# The fake model computes nothing. A step of a real one takes a while, and so there is something to
# interrupt.
FAKE_STEP = "runner.execute:sleep=0.002"
EX_USAGE = 2


async def disturb(options: argparse.Namespace) -> bool:
    """Run the load with one kind of fault; whether nothing came of it."""
    dice = Random(options.seed)
    fault = make_fault(options.kill, dice, has_spare=options.standby)
    restarts = Restarts(fault)
    args = {**engine_args(options), "quantization": options.quantization}
    disturbed = EngineArgs(**args, **fault.engine_args, standby=options.standby, max_restarts=10**6)
    async with AsyncLLMEngine.from_engine_args(EngineArgs(**args)) as engine:
        vocab_size = (await engine.get_model_config()).vocab_size
        load = Load(make_templates(options.requests, options.seed, vocab_size))
        await load.learn(engine, options.streams)
    print(f"{options.requests} different requests have been run undisturbed", file=sys.stderr)
    waits: list[float] = []
    fault.arm()
    async with AsyncLLMEngine.from_engine_args(disturbed, on_restart=restarts.note) as engine:
        load.begin(engine, options.streams)
        await load.next_token(options.timeout)
        until = time.monotonic() + (options.seconds or float("inf"))
        while len(waits) < options.kills and time.monotonic() < until:
            await asyncio.sleep(dice.expovariate(1 / options.every))
            waits.append(await fault.strike(engine, load, restarts))
            if dice.random() < 0.2:  # at once again, whatever is being made good just now
                waits.append(await fault.strike(engine, load, restarts))
            await load.all_go_on(options.timeout)
        os.environ.pop(FAIL_POINTS, None)
        await load.end()
        num_replayed = engine.requests_replayed
        stats, limits = await engine.get_stats(), await engine.get_scheduler_config()
    num_left = stats.num_running + stats.num_waiting
    num_held = limits.num_kv_blocks - stats.num_free_blocks
    async with AsyncLLMEngine.from_engine_args(EngineArgs(**args)) as engine:
        await load.check_rest(engine, options.streams)
    spare = "a warm spare" if options.standby else "no spare"
    if isinstance(fault, KillWithSpare):
        spare += f" that was killed {fault.num_spares_killed} times"
    print(
        f"model {options.model}, {options.streams} streams at a time, fault {options.kill!r}, "
        f"{spare}, seed {options.seed}\n"
        f"{load.num_streams} streams, {load.num_tokens} tokens, {len(waits)} faults, "
        f"{len(restarts.records)} restarts, {num_replayed} requests replayed; left in the core: "
        f"{num_left} requests, {num_held} blocks"
    )
    return report(load, waits) and not num_left and not num_held


def engine_args(options: argparse.Namespace) -> dict[str, Any]:
    """Of all engines of a run."""
    return {
        "model": options.model,
        "scheduling_policy": "priority",
        "log_level": "ERROR",
        "max_model_len": 1024 if options.model == "fake" else None,
    }


def keep_quiet(log: str) -> None:
    """Send what the cores say to a file: they say a lot when they die. What this process has to
    say is still seen."""
    logging.disable(logging.ERROR)  # every restart would tell its cause
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def report(load: Load, waits: Sequence[float]) -> bool:
    """Print what has come of it; whether nothing was wrong."""
    damage = load.damage
    print(
        f"lost {damage.lost}, doubled {damage.doubled}, changed {damage.changed}, "
        f"failed {len(load.failures)}"
    )
    if len(waits) > 1:
        cuts = statistics.quantiles(waits, n=100, method="inclusive")
        print(f"time to next token: p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s")
    for line in (*load.failures[:5], *load.differences[:5]):
        print(f"  {line[:2000]}")
    return not (damage.lost or damage.doubled or damage.changed or load.failures)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fake", help="fake, demo, 160m, or a folder")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="of its weights")
    parser.add_argument("--kill", choices=(*FAULTS, "worker"), default="core")
    parser.add_argument("--kills", type=int, help="how often; 200 if no time is given")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument("--every", type=float, default=0.3, help="mean seconds between faults")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=280, help="different ones")
    parser.add_argument(
        "--standby", action="store_true", help="with a warm spare, which dies as well"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="for the first token")
    parser.add_argument("--log", default=os.devnull, help="a file for what the cores say")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kill == "worker":
        print("chaos.py: there are no workers yet: an engine has one process", file=sys.stderr)
        return EX_USAGE
    if options.kills is None:
        options.kills = 200 if options.seconds is None else sys.maxsize
    if options.model == "160m":
        options.model = make_random_model("llama-160m", "auto", has_tokenizer=True)
    keep_quiet(options.log)
    if options.model == "fake":
        os.environ.setdefault(FAIL_POINTS, FAKE_STEP)
    return 0 if asyncio.run((kill_clients if options.kill == "client" else disturb)(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
