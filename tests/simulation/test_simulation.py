"""Random clients, a tiny cache, a runner that checks every slot: nothing may change a stream."""

from collections import Counter

from .checking_runner import BrokenPlan
from .simulation import Simulation


def test_every_stream_is_what_it_would_be_alone(seeds: range) -> None:
    for seed in seeds:
        simulation = Simulation(seed)
        try:
            simulation.run()
        except (Exception, BrokenPlan) as error:
            error.add_note(
                f"in step {simulation.num_steps}; to replay: "
                f"pytest tests/simulation --simulation-seed {seed}"
            )
            raise


def test_a_seed_replays_its_schedule() -> None:
    first, second = Simulation(17), Simulation(17)
    assert first.run() == second.run()
    assert (first.num_steps, first.happened) == (second.num_steps, second.happened)
    assert Simulation(18).run() != first.core.stats()


def test_the_schedules_go_where_it_hurts() -> None:
    seen: Counter[str] = Counter()
    for seed in range(100):
        simulation = Simulation(seed)
        stats = simulation.run()
        seen += simulation.happened
        seen["preemption"] += stats.num_preemptions
        seen["cached token"] += stats.prefix_cache_hits
        seen["preemption by priority"] += stats.num_preemptions * simulation.by_priority
    assert seen["preemption"] > seen["preemption by priority"] > 50
    assert seen["cached token"] > 500
    assert seen["add"] > 1000
    assert min(seen[event] for event in ("abort", "siblings", "deadline", "stop", "error")) > 100
    assert min(seen[event] for event in ("refusal", "prior", "overflow", "fair share")) > 50
    assert min(seen[event] for event in ("shared with a sibling", "stats", "reset done")) > 30
    assert min(seen[event] for event in ("leave", "repetition", "complete before")) > 10
