"""The number of threads follows what steps cost."""

from collections.abc import Callable

from footplate.backend.runner.thread_governor import FIRST_PAUSE, LONGEST_PAUSE, ThreadGovernor


class Machine:
    """A machine on which a step takes what a function of the number of threads says."""

    def __init__(self, num_threads: int, cost: Callable[[int], float]) -> None:
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


def quiet(threads: int) -> float:
    return 0.010 / threads


def busy(threads: int) -> float:
    return 0.010 if threads == 1 else 0.100


def test_a_quiet_machine_is_used_with_all_threads_and_trials_become_rare() -> None:
    machine = Machine(2, quiet)
    used = machine.run(20 * LONGEST_PAUSE)
    assert used[0] == 2
    assert used[-LONGEST_PAUSE:].count(1) <= 1
    assert used.count(1) < 40


def test_a_busy_neighbour_is_noticed_within_a_few_steps() -> None:
    machine = Machine(2, quiet)
    machine.run(5 * LONGEST_PAUSE)
    machine.cost = busy
    assert machine.run(10).count(2) <= 2


def test_all_threads_come_back_when_the_neighbour_leaves() -> None:
    machine = Machine(2, busy)
    machine.run(5 * LONGEST_PAUSE)
    machine.cost = quiet
    machine.run(LONGEST_PAUSE)
    assert machine.run(FIRST_PAUSE).count(2) >= FIRST_PAUSE - 1


def test_steps_of_different_size_are_judged_by_themselves() -> None:
    machine = Machine(2, busy)
    machine.run(100, num_tokens=1)
    machine.cost = quiet
    assert machine.run(FIRST_PAUSE - 1, num_tokens=512).count(1) == 0


def test_one_thread_leaves_nothing_to_choose() -> None:
    machine = Machine(1, quiet)
    assert set(machine.run(200)) == {1}
