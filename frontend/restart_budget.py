"""How often an engine core may be replaced before that is no help any more."""

from collections import deque

# An engine that served is replaced at once; one that did not even start waits, twice as long each
# time.
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0


class RestartBudget:
    """Owns the times of the last restarts. Pure: given a clock's readings.

    Args:
        max_restarts: most of them in any `window_s` seconds.
    """

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._restarts: deque[float] = deque()
        self._delay_s = FIRST_DELAY_S  # before the next, if it is one that did not even start

    def spend(self, now: float, *, had_served: bool) -> float | None:
        """A core has ended at `now` (monotonic seconds).

        Args:
            had_served: whether it was ever ready.

        Returns:
            Seconds to wait before another is started; None when the budget is spent.
        """
        while self._restarts and now - self._restarts[0] > self._window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return None
        self._restarts.append(now)
        if had_served:
            self._delay_s = FIRST_DELAY_S
            return 0.0
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, MAX_DELAY_S)
        return delay_s
