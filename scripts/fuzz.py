#!/usr/bin/env python3
"""Feed frames that are nearly messages to whatever reads frames, and see whether it minds.

scripts/fuzz.py                            1,000,000 to both decoders and what stands behind them
scripts/fuzz.py --sockets                  100,000 to the sockets of a live core and its client
scripts/fuzz.py --frames 50000 --seed 7    another number, other dice
"""

import argparse
import asyncio
import logging
import sys
import time
from random import Random

import psutil

from fuzz_sockets import fuzz_client_socket, fuzz_core_socket
from fuzz_targets import ClientTarget, CoreTarget

REPORT_EVERY_S = 10.0
logging.disable()  # what is dropped is counted; a line for each would be half of the work


def resident_mib() -> float:
    """Memory of this process."""
    return float(psutil.Process().memory_info().rss / 2**20)


async def fuzz_decoders(num_frames: int, seed: int) -> None:
    """Half of the frames to what a core does with them, half to what a client does."""
    dice = Random(seed)
    targets = (CoreTarget(dice), ClientTarget(dice))
    since = told = time.monotonic()
    before_mib = 0.0
    for number in range(num_frames):
        if number == num_frames // 10:
            before_mib = resident_mib()  # caches are warm
        targets[number % 2].take_next()
        if (now := time.monotonic()) - told > REPORT_EVERY_S:
            told = now
            print(f"{number} frames, {resident_mib():.0f} MiB resident", file=sys.stderr)
    for target in targets:
        target.check()
        print(f"{target.name}: {target.tally}")
    seconds = time.monotonic() - since
    print(
        f"{num_frames} frames in {seconds:.0f} s (seed {seed}); memory grew by "
        f"{resident_mib() - before_mib:.1f} MiB after the first tenth"
    )


async def fuzz_sockets(num_frames: int, seed: int) -> None:
    """A tenth of the frames to the PULL of a client, the others to the ROUTER of its core."""
    print(await fuzz_core_socket(num_frames - num_frames // 10, seed))
    print(await fuzz_client_socket(num_frames // 10, seed))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, help="1,000,000, or 100,000 with --sockets")
    parser.add_argument("--sockets", action="store_true", help="through real sockets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.sockets:
        asyncio.run(fuzz_sockets(args.frames or 100_000, args.seed))
    else:
        asyncio.run(fuzz_decoders(args.frames or 1_000_000, args.seed))


if __name__ == "__main__":
    main()
