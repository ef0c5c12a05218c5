"""How many threads a step should use, learnt from what steps have cost lately.

On a machine of its own a step is fastest on all cores. Where something else runs, every
parallel region waits for the thread that was put aside, and one thread alone can be ten times
faster than two that share a core with a busy neighbour. Nobody tells a process which of the two
it is; the duration of its steps does. Results do not depend on the number of threads, so trying is
free of consequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Larger steps get all threads: their parallel regions are long, and a thread that was put aside
# comes back before the others are through.
MAX_TOKENS = 64
# How long after the first step, and between two trials, the other choice is tried on steps of one
# kind. A lost trial doubles the pause.
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 64.0
# What a new measurement weighs against those before it.
WEIGHT = 0.25
# Two steps in a row that take so many times as long as those before: something has changed, try
# at once. A single one is the noise of any machine.
SURPRISE = 1.5


@dataclass(slots=True)
class _Kind:
    """What is known about steps of about one size."""

    best: int
    other: int
    next_trial: float  # on the clock
    pause_s: float = FIRST_PAUSE_S
    usual_seconds: float = 0.0  # with the best number of threads, smoothed
    was_slow: bool = False


class ThreadGovernor:
    """Chooses between all threads and one.

    Args:
        num_threads: what "all" means.
        set_num_threads: makes it so for the calling thread.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        num_threads: int,
        set_num_threads: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self._num_threads = num_threads
        self._set_num_threads = set_num_threads
        self._clock = clock
        self._kinds: dict[int, _Kind] = {}
        self._current = num_threads

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Run a step of so many tokens within the context."""
        if self._num_threads == 1:
            yield
            return
        if num_tokens > MAX_TOKENS:
            self._use(self._num_threads)
            yield
            return
        started = self._clock()
        # Powers of two: steps of one kind cost about the same.
        kind = self._kinds.setdefault(
            num_tokens.bit_length(), _Kind(self._num_threads, 1, started + FIRST_PAUSE_S)
        )
        is_trial = started >= kind.next_trial and kind.usual_seconds > 0
        self._use(kind.other if is_trial else kind.best)
        yield
        self._learn(kind, is_trial, started, self._clock())

    def _use(self, num_threads: int) -> None:
        if num_threads != self._current:
            self._set_num_threads(num_threads)
            self._current = num_threads

    def _learn(self, kind: _Kind, is_trial: bool, started: float, ended: float) -> None:
        seconds = ended - started
        if not is_trial:
            usual = kind.usual_seconds or seconds
            is_slow = seconds > SURPRISE * usual
            if is_slow and kind.was_slow:
                kind.next_trial, kind.pause_s = ended, FIRST_PAUSE_S
            kind.was_slow = is_slow
            kind.usual_seconds = usual + WEIGHT * (seconds - usual)
            return
        if seconds < kind.usual_seconds:
            kind.best, kind.other = kind.other, kind.best
            kind.usual_seconds = seconds
            kind.pause_s = FIRST_PAUSE_S
        else:
            kind.pause_s = min(2 * kind.pause_s, LONGEST_PAUSE_S)
        kind.next_trial = ended + kind.pause_s
