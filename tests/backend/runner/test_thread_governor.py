"""The number of threads follows what steps cost."""

from collections.abc import Callable

from footplate.backend.runner.thread_governor import LONGEST_PAUSE_S, MAX_TOKENS, ThreadGovernor

Cost = Callable[[int], float]


class Machine:
    """A machine on which a step takes what a function of the number of threads says."""

    def __init__(self, num_threads: int, cost: Cost) -> None:
        self.cost = cost
        self.now = 0.0
        self.threads = num_threads
        self.used: list[int] = []
        self.governor = ThreadGovernor(num_threads, self._set, lambda: self.now)

    def _set(self, num_threads: int) -> None:
        self.threads = num_threads

    def run(self, num_steps: int, num_tokens: int = 1) -> list[int]:
        start = len(self.used)
        for _ in range(num_steps):
            with self.governor.step(num_tokens):
                self.used.append(self.threads)
                self.now += self.cost(self.threads)
        return self.used[start:]

    def run_for(self, seconds: float) -> list[int]:
        start, end = len(self.used), self.now + seconds
        while self.now < end:
            self.run(1)
        return self.used[start:]


def quiet(threads: int) -> float:
    return 0.010 / threads


def busy(threads: int) -> float:
    return 0.010 if threads == 1 else 0.100


def test_a_quiet_machine_is_used_with_all_threads_and_trials_become_rare() -> None:
    machine = Machine(2, quiet)
    assert machine.run_for(1.5).count(1) == 0
    assert machine.run_for(10 * LONGEST_PAUSE_S).count(1) < 20
    assert machine.run_for(LONGEST_PAUSE_S).count(1) <= 1


def test_a_neighbour_from_the_start_is_noticed_within_seconds() -> None:
    machine = Machine(2, busy)
    machine.run_for(3)
    assert machine.run(10) == 10 * [1]


def test_a_neighbour_who_comes_later_is_noticed_within_a_few_steps() -> None:
    machine = Machine(2, quiet)
    machine.run_for(5 * LONGEST_PAUSE_S)
    machine.cost = busy
    assert machine.run(10).count(2) <= 3


def test_one_slow_step_is_no_reason_to_try_anything() -> None:
    machine = Machine(2, quiet)
    machine.run(20)
    machine.cost = busy
    machine.run(1)
    machine.cost = quiet
    assert machine.run(20) == 20 * [2]


def test_all_threads_come_back_when_the_neighbour_leaves() -> None:
    machine = Machine(2, busy)
    machine.run_for(5 * LONGEST_PAUSE_S)
    machine.cost = quiet
    machine.run_for(LONGEST_PAUSE_S + 1)
    assert machine.run(20).count(2) >= 19


def test_steps_of_different_size_are_judged_by_themselves() -> None:
    machine = Machine(2, busy)
    machine.run(100, num_tokens=1)
    machine.cost = quiet
    assert machine.run(20, num_tokens=32) == 20 * [2]


def test_large_steps_always_get_all_threads() -> None:
    machine = Machine(2, busy)
    machine.run_for(5)
    assert machine.run(1) == [1]
    assert set(machine.run(100, num_tokens=MAX_TOKENS + 1)) == {2}


def test_one_thread_leaves_nothing_to_choose() -> None:
    machine = Machine(1, quiet)
    assert set(machine.run(1000)) == {1}
