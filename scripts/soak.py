#!/usr/bin/env python3
"""Let an engine work at half load for half an hour while its core is killed, stopped and sent
garbage at random, and watch its tokens and its memory.

scripts/soak.py                              30 minutes, fake model
scripts/soak.py --model demo --minutes 10
scripts/soak.py --faults stop garbage        one core all the time: whether its memory levels off
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

import psutil

from chaos import FAKE_STEP, engine_args, keep_quiet
from chaos_faults import FAIL_POINTS, Kill, Restarts, make_fault
from chaos_load import Load, make_templates
from footplate.frontend import AsyncLLMEngine, EngineArgs

FAULTS = ("core", "stop", "garbage")
NUM_BLOCKS = 4096
SAMPLE_S = 5.0
REPORT_S = 60.0
# Of each core, and of the client, whose memory grows until every kind of request has come in every
# company: at full speed it is level after 1.5 million tokens, and stays so. Here those take longer.
WARM_UP_S = 300.0


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in MiB.

    Attributes:
        minute: since the start.
        core: the process that it is about.
        core_age_s: since that process took its place.
    """

    minute: float
    client: float
    core: int
    core_mib: float
    core_age_s: float


def spread(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of points around their mean: the sum of the products of both coordinates, and of the squares
    of the first. Their quotient is the slope of the line of best fit."""
    mean_x = sum(x for x, _ in points) / max(1, len(points))
    mean_y = sum(y for _, y in points) / max(1, len(points))
    products = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return products, sum((x - mean_x) ** 2 for x, _ in points)


def slopes(samples: Sequence[Sample]) -> tuple[float, float]:
    """MiB per minute of the client and of cores: lines of one slope, each core with its own
    height."""
    late = [(s.minute, s.client) for s in samples if 60 * s.minute > WARM_UP_S]
    products, squares = spread(late)
    client = products / squares if squares else 0.0
    products = squares = 0.0
    for _, of_core in groupby(samples, key=lambda sample: sample.core):
        old = [(s.minute, s.core_mib) for s in of_core if s.core_age_s > WARM_UP_S]
        more = spread(old)
        products, squares = products + more[0], squares + more[1]
    return client, products / squares if squares else 0.0


async def watch(engine: AsyncLLMEngine, load: Load, samples: list[Sample]) -> None:
    """Take samples for ever, and tell them once a minute."""
    begun = told = born = time.monotonic()
    core = engine.process_id
    own = psutil.Process()
    while True:
        await asyncio.sleep(SAMPLE_S)
        now = time.monotonic()
        if engine.process_id != core:
            core, born = engine.process_id, now
        if core is None or not engine.is_running:
            continue
        try:
            core_mib = psutil.Process(core).memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
        client_mib = own.memory_info().rss / 2**20
        samples.append(Sample((now - begun) / 60, client_mib, core, core_mib, now - born))
        if now - told >= REPORT_S:
            told = now
            print(
                f"minute {(now - begun) / 60:.0f}: {load.num_streams} streams, {load.num_tokens} "
                f"tokens, {engine.engine_restarts} restarts, {load.damage}, "
                f"{len(load.failures)} failed; client {client_mib:.1f} MiB, core {core_mib:.1f}",
                flush=True,
            )


async def soak(options: argparse.Namespace) -> bool:
    """Whether every token was right."""
    dice = Random(options.seed)
    faults = [make_fault(name, dice) for name in options.faults]
    restarts = Restarts(Kill(dice))
    # Few blocks: their prefix cache is full within a minute, and does not look like a leak.
    args = {**engine_args(options), "num_gpu_blocks_override": NUM_BLOCKS}
    samples: list[Sample] = []
    num_faults = 0
    engine = AsyncLLMEngine.from_engine_args(
        EngineArgs(**args, max_restarts=10**6), on_restart=restarts.note
    )
    async with engine:
        vocab_size = (await engine.get_model_config()).vocab_size
        templates = make_templates(options.requests, options.seed, vocab_size)
        # Of the others the answers would have to be kept until the end.
        load = Load([template for template in templates if not template.needs_seed])
        await load.learn(engine, options.streams)
        load.begin(engine, options.streams, rest=1.0)
        watching = asyncio.create_task(watch(engine, load, samples))
        until = time.monotonic() + 60 * options.minutes
        while (left_s := until - time.monotonic()) > 0:
            pause_s = dice.expovariate(1 / options.every)
            await asyncio.sleep(min(pause_s, left_s))
            if pause_s > left_s:
                break
            await dice.choice(faults).strike(engine, load, restarts)
            await load.all_go_on(600.0)
            num_faults += 1
        watching.cancel()
        await load.end()
    client, core = slopes(samples)
    damage = load.damage
    print(
        f"model {options.model}, {options.minutes:g} minutes, {options.streams} streams half of "
        f"the time, seed {options.seed}: {load.num_streams} streams, {load.num_tokens} tokens, "
        f"{num_faults} faults, {len(restarts.records)} restarts\n"
        f"lost {damage.lost}, doubled {damage.doubled}, changed {damage.changed}, "
        f"failed {len(load.failures)}\n"
        f"memory: client {client:+.3f} MiB a minute, cores {core:+.3f} MiB a minute"
    )
    for line in (*load.failures[:5], *load.differences[:5]):
        print(f"  {line[:2000]}")
    return not (damage.lost or damage.doubled or damage.changed or load.failures)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fake", help="fake, demo, or a folder")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between faults")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=280, help="different ones")
    parser.add_argument("--log", default=os.devnull, help="a file for what the cores say")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_quiet(options.log)
    if options.model == "fake":
        os.environ.setdefault(FAIL_POINTS, FAKE_STEP)
    return 0 if asyncio.run(soak(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
