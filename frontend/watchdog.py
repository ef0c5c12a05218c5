"""Tells an engine core that works from one that is stopped or hung, by its answers to pings.

A core is not judged by how long a request takes: a step may take seconds, a full queue minutes.
What counts is that it answers, and that its count of steps moves; a core without work is idle,
which is not hung. Pure: given a clock's readings.
"""

from dataclasses import dataclass
from enum import Enum, auto

from footplate.protocol.messages import Pong


class Verdict(Enum):
    """What is to be done about a core."""

    WELL = auto()  # nothing
    SILENT = auto()  # it does not answer: it is stopped, or holds the interpreter for long
    STALLED = auto()  # one step has taken too long: have it say where it is. Told once.
    HUNG = auto()  # too long to hope: end it


@dataclass(frozen=True, slots=True)
class Patience:
    """All in seconds.

    Attributes:
        beat_s: from ping to ping.
        silent_s: without an answer, before a core counts as silent.
        stalled_s: in one step, or without an answer.
        hung_s: likewise.
    """

    beat_s: float = 0.25
    silent_s: float = 1.0
    stalled_s: float = 5.0
    hung_s: float = 60.0


class Watchdog:
    """Owns what is known of one core's pulse.

    Time is counted in ticks of its own, none longer than two beats: when this process, or the
    whole machine, has been suspended, the core has not been silent for that long.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._last_tick: float | None = None
        self._silent_s = 0.0
        self._frozen_s = 0.0  # for which it has been in the same step
        self._num_steps = -1
        self._is_busy = False
        self._was_told = False

    @property
    def last_step_age_s(self) -> float:
        """Seconds since the core is known to have made progress; 0 when it is idle."""
        return self._frozen_s

    @property
    def is_silent(self) -> bool:
        """Whether the core has not answered for longer than it should."""
        return self._silent_s > self._patience.silent_s

    def hear(self, pong: Pong) -> None:
        """The core has answered."""
        self._silent_s = 0.0
        if pong.num_steps != self._num_steps or not pong.is_busy:
            self._frozen_s = 0.0
            self._was_told = False
        self._num_steps = pong.num_steps
        self._is_busy = pong.is_busy

    def tick(self, now: float) -> Verdict:
        """A ping is about to be sent at `now` (monotonic seconds), and answers are waited for."""
        patience = self._patience
        if self._last_tick is not None:
            passed = min(now - self._last_tick, 2 * patience.beat_s)
            self._silent_s += passed
            # A core that does not answer gets no further either, as far as anybody can tell.
            if self._is_busy or self.is_silent:
                self._frozen_s += passed
        self._last_tick = now
        if self._frozen_s > patience.hung_s:
            return Verdict.HUNG
        if self._frozen_s > patience.stalled_s and not self._was_told:
            self._was_told = True
            return Verdict.STALLED
        return Verdict.SILENT if self.is_silent else Verdict.WELL

    def rest(self) -> None:
        """No pings are sent for now, so no answers are missed, and nothing is known of the core."""
        self._last_tick = None
        self._silent_s = 0.0
        self._frozen_s = 0.0
        self._is_busy = False
        self._was_told = False
