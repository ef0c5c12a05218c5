"""The number of threads follows what steps cost."""

from footplate.backend.runner.thread_governor import LONGEST_PAUSE_S, ThreadGovernor


class Machine:
    """A machine that may be shared with a busy neighbour.

    Alone, n threads take 1/n of the time. With the neighbour two threads get three quarters of the
    cores, and take ten times as long.
    """

    def __init__(self, num_threads: int, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.now = self.cpu = 0.0
        self.threads = num_threads
        self.used: list[int] = []
        self.governor = ThreadGovernor(num_threads, self._set, lambda: self.now, lambda: self.cpu)

    def _set(self, num_threads: int) -> None:
        self.threads = num_threads

    def run(self, num_steps: int, num_tokens: int = 1) -> list[int]:
        start = len(self.used)
        for _ in range(num_steps):
            with self.governor.step(num_tokens):
                self.used.append(self.threads)
                is_held_up = self.is_shared and self.threads > 1
                seconds = 0.100 if is_held_up else 0.010 / self.threads
                self.now += seconds
                self.cpu += seconds * self.threads * (0.75 if is_held_up else 1.0)
        return self.used[start:]

    def run_for(self, seconds: float) -> list[int]:
        start, end = len(self.used), self.now + seconds
        while self.now < end:
            self.run(1)
        return self.used[start:]


def test_a_machine_of_its_own_is_used_with_all_threads() -> None:
    machine = Machine(2)
    assert set(machine.run_for(1000)) == {2}


def test_a_neighbour_is_noticed_within_a_few_steps() -> None:
    machine = Machine(2, is_shared=True)
    assert machine.run(10)[4:] == 6 * [1]


def test_so_is_one_who_comes_later() -> None:
    machine = Machine(2)
    machine.run_for(1000)
    machine.is_shared = True
    assert machine.run(10)[4:] == 6 * [1]


def test_other_steps_profit_from_what_is_known() -> None:
    machine = Machine(2, is_shared=True)
    machine.run(10)
    assert machine.run(5, num_tokens=512) == [2, 1, 1, 1, 1]


def test_all_threads_come_back_when_the_neighbour_leaves() -> None:
    machine = Machine(2, is_shared=True)
    machine.run_for(5 * LONGEST_PAUSE_S)
    machine.is_shared = False
    machine.run_for(LONGEST_PAUSE_S)
    assert machine.run(100) == 100 * [2]


def test_trials_beside_a_neighbour_who_stays_become_rare() -> None:
    machine = Machine(2, is_shared=True)
    machine.run_for(5 * LONGEST_PAUSE_S)
    assert machine.run_for(2 * LONGEST_PAUSE_S).count(2) <= 2


def test_all_threads_are_kept_where_sharing_does_not_hurt() -> None:
    """A neighbour who takes little: one thread is tried now and then, and is slower."""

    class Mild(Machine):
        def run(self, num_steps: int, num_tokens: int = 1) -> list[int]:
            start = len(self.used)
            for _ in range(num_steps):
                with self.governor.step(num_tokens):
                    self.used.append(self.threads)
                    self.now += 0.012 / self.threads
                    self.cpu += 0.012 * 0.85
            return self.used[start:]

    machine = Mild(2)
    machine.run_for(1000)
    assert machine.run_for(2 * LONGEST_PAUSE_S).count(1) <= 2


def test_one_thread_leaves_nothing_to_choose() -> None:
    machine = Machine(1)
    assert set(machine.run(1000)) == {1}
