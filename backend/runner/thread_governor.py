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

# The first time the other choice is tried, and the longest pause between two trials, in steps of
# one kind. A lost trial doubles the pause: on a quiet machine trials cost 0.1 % in the end.
FIRST_PAUSE = 16
LONGEST_PAUSE = 1024
# What a new measurement weighs against those before it.
WEIGHT = 0.25
# A step that takes so many times as long as those before it: something has changed, try at once.
SURPRISE = 1.5


@dataclass(slots=True)
class _Kind:
    """What is known about steps of about one size."""

    best: int
    other: int
    usual_seconds: float = 0.0  # with the best number of threads, smoothed
    pause: int = FIRST_PAUSE
    until_trial: int = FIRST_PAUSE


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
        # Powers of two: steps of one kind cost about the same.
        kind = self._kinds.setdefault(
            num_tokens.bit_length(), _Kind(best=self._num_threads, other=1)
        )
        kind.until_trial -= 1
        is_trial = kind.until_trial == 0
        self._use(kind.other if is_trial else kind.best)
        started = self._clock()
        yield
        self._learn(kind, is_trial, self._clock() - started)

    def _use(self, num_threads: int) -> None:
        if num_threads != self._current:
            self._set_num_threads(num_threads)
            self._current = num_threads

    def _learn(self, kind: _Kind, is_trial: bool, seconds: float) -> None:
        if not is_trial:
            usual = kind.usual_seconds or seconds
            kind.usual_seconds = usual + WEIGHT * (seconds - usual)
            if seconds > SURPRISE * usual:
                kind.until_trial, kind.pause = 1, FIRST_PAUSE
            return
        if seconds < kind.usual_seconds:
            kind.best, kind.other = kind.other, kind.best
            kind.usual_seconds = seconds
            kind.pause = FIRST_PAUSE
        else:
            kind.pause = min(2 * kind.pause, LONGEST_PAUSE)
        kind.until_trial = kind.pause
