"""What the busy loop is doing, for those who ask from outside."""

import time


class Pulse:
    """Written by the main thread, read by any other: a reading may be one step old.

    Attributes:
        num_steps: turns of the loop begun since the start: what has come, a step, what goes out.
        is_busy: whether the main thread is in one; else it waits for something to do.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.is_busy = False
        self._since = 0.0

    @property
    def step_age_s(self) -> float:
        """How long the current turn has taken so far; 0 while it waits."""
        return time.monotonic() - self._since if self.is_busy else 0.0

    def begin(self) -> None:
        """There is something to do."""
        self._since = time.monotonic()
        self.num_steps += 1
        self.is_busy = True

    def end(self) -> None:
        """It is done."""
        self.is_busy = False
