#!/usr/bin/env python3
"""Run worlds of sessions and engine cores, with faults, and check every token of every stream.

scripts/simulate.py                          20,000 seeds: for the night
scripts/simulate.py --count 500 --first 17   others
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.simulation.checking_runner import BrokenPlan
from tests.simulation.world import NUM_EVENTS, run_world

app = App(help=__doc__, help_format="plaintext")


@app.default
def simulate(
    *,
    count: Annotated[int, Parameter(help="How many worlds, each with its seed.")] = 20_000,
    first: Annotated[int, Parameter(help="The first seed.")] = 0,
) -> None:
    """Stop at the first world in which a promise is broken, and say how it came to that."""
    seen: Counter[str] = Counter()
    since = time.perf_counter()
    for seed in range(first, first + count):
        try:
            seen += run_world(seed)
        except (Exception, BrokenPlan):
            print(f"seed {seed} is the first to fail, after {seed - first} that did not")
            raise
    minutes = (time.perf_counter() - since) / 60
    print(f"{count} worlds of {NUM_EVENTS} events, {count / minutes:,.0f} a minute; none failed")
    deaths = {name: seen[name] for name in ("kill", "crash", "hung")}
    print(f"cores that ended: {deaths}; requests replayed: {seen['replay']}")
    print(f"preemptions: {seen['preemption']}; connections lost: {seen['lost']}")
    ends = {name: seen[name] for name in ("stop", "length", "abort", "deadline", "error")}
    print(f"completions by their end: {ends}")


if __name__ == "__main__":
    app()
