"""How many threads a step should use, learnt from what steps have cost lately.

On a machine of its own a step is fastest on all cores. Where something else runs, every
parallel region waits for the thread that was put aside, and one thread alone can be ten times
faster than two that share a core with a busy neighbour. Nobody tells a process which of the two
it is; that its threads, which never sleep within a step, get less time than the clock shows, does.
Results do not depend on the number of threads, so trying is free of consequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Threads that get less than this share of the cores they are on have a neighbour.
CONTENDED = 0.9
# What a new measurement weighs against those before it.
WEIGHT = 0.25
# Between two trials of steps of one size. A lost trial doubles the pause.
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 64.0


@dataclass(slots=True)
class _Kind:
    """What is known about steps of about one size."""

    best: int
    other: int
    usual_seconds: float = 0.0  # with the best number of threads, smoothed
    pause_s: float = FIRST_PAUSE_S
    next_trial: float = 0.0  # on the clock, not earlier


class ThreadGovernor:
    """Chooses between all threads and one.

    Args:
        num_threads: what "all" means.
        set_num_threads: makes it so for the calling thread.
        clock: monotonic, seconds.
        cpu_clock: processor time of all threads of this process, seconds.
    """

    def __init__(
        self,
        num_threads: int,
        set_num_threads: Callable[[int], None],
        clock: Callable[[], float],
        cpu_clock: Callable[[], float],
    ) -> None:
        self._num_threads = num_threads
        self._set_num_threads = set_num_threads
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._kinds: dict[int, _Kind] = {}
        self._current = num_threads
        self._share = 1.0  # of the cores, while all threads were used; smoothed

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Run a step of so many tokens within the context."""
        if self._num_threads == 1:
            yield
            return
        # Powers of two: steps of one kind cost about the same.
        kind = self._kinds.setdefault(
            num_tokens.bit_length(), _Kind(best=self._num_threads, other=1)
        )
        started, cpu_started = self._clock(), self._cpu_clock()
        # One thread does not see its neighbour leave, so from there trials come by the clock.
        is_doubtful = kind.best == 1 or self._share < CONTENDED
        is_trial = is_doubtful and kind.usual_seconds > 0 and started >= kind.next_trial
        self._use(kind.other if is_trial else kind.best)
        yield
        ended = self._clock()
        if self._current == self._num_threads and ended > started:
            cpu_seconds = self._cpu_clock() - cpu_started
            share = cpu_seconds / (ended - started) / self._num_threads
            self._share += WEIGHT * (share - self._share)
        if is_trial:
            _judge(kind, ended - started, ended)
        else:
            usual = kind.usual_seconds or ended - started
            kind.usual_seconds = usual + WEIGHT * (ended - started - usual)

    def _use(self, num_threads: int) -> None:
        if num_threads != self._current:
            self._set_num_threads(num_threads)
            self._current = num_threads


def _judge(kind: _Kind, seconds: float, now: float) -> None:
    if seconds < kind.usual_seconds:
        kind.best, kind.other = kind.other, kind.best
        kind.usual_seconds = seconds
        kind.pause_s = FIRST_PAUSE_S
    else:
        kind.pause_s = min(2 * kind.pause_s, LONGEST_PAUSE_S)
    kind.next_trial = now + kind.pause_s
