"""Cores die, hang and are stopped, connections are cut, clients come and go, and every stream is
what it would have been alone."""

from collections import Counter

from .world import FAULTS, World, run_world


def test_every_stream_goes_on_exactly(world_seeds: range) -> None:
    for seed in world_seeds:
        run_world(seed)


def test_a_seed_replays_its_world() -> None:
    first, second = World(17), World(17)
    assert first.run() == second.run()
    assert first.events == second.events and first.now == second.now
    assert World(18).run() != first.happened


def test_the_worlds_go_where_it_hurts() -> None:
    seen: Counter[str] = Counter()
    for seed in range(150):
        seen += run_world(seed)
    assert min(seen[fault] for fault in FAULTS) > 100
    assert min(seen[death] for death in ("kill", "crash", "hung")) > 50
    assert min(seen[event] for event in ("stalled", "lost", "preemption", "failed start")) > 20
    assert seen["replay"] > 1000
    assert min(seen[end] for end in ("stop", "length", "abort", "deadline", "error")) > 50
    assert min(seen[event] for event in ("stop string", "repetition", "grammar", "blame")) > 10
    assert min(seen[event] for event in ("overflow", "spent")) > 5
