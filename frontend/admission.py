"""How much may wait: the client's share of admission control. Pure: given a clock's readings."""

from collections import deque

from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import InvalidRequestError, QueueOverflowError

NUM_REMEMBERED = 64
DEFAULT_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class WaitingRequests:
    """Owns the count of this client's requests that have not had their first token, and how fast
    they start.

    An overfull queue helps nobody: everyone in it waits longer, and memory grows. A refusal at
    the door costs microseconds and says when to come back.
    """

    def __init__(self) -> None:
        self.num_reqs = 0
        self.num_tokens = 0
        # When requests started lately, and how many prompt tokens went with each.
        self._starts: deque[tuple[float, int]] = deque(maxlen=NUM_REMEMBERED)

    def require_room(self, limits: RequestConfig, num_reqs: int, num_tokens: int = 0) -> None:
        """Refuse what would not fit.

        Raises:
            InvalidRequestError: it would not fit if nobody waited.
            QueueOverflowError: with the limit, and an estimate of when there is room.
        """
        most_reqs, most_tokens = limits.max_num_queued_reqs, limits.max_num_queued_tokens
        if most_reqs is None and most_tokens is None:
            return  # asked twice of every request
        if most_reqs is not None and num_reqs > most_reqs:
            raise _never("requests", num_reqs, f"max_num_queued_reqs={most_reqs}")
        if most_tokens is not None and num_tokens > most_tokens:
            raise _never("prompt tokens", num_tokens, f"max_num_queued_tokens={most_tokens}")
        if most_reqs is not None and self.num_reqs + num_reqs > most_reqs:
            wait_s = self._seconds_until_left(self.num_reqs + num_reqs - most_reqs, 0)
            raise QueueOverflowError(
                f"{self.num_reqs} requests wait, {num_reqs} more would be beyond "
                f"max_num_queued_reqs={most_reqs}",
                wait_s,
            )
        if most_tokens is not None and self.num_tokens + num_tokens > most_tokens:
            wait_s = self._seconds_until_left(0, self.num_tokens + num_tokens - most_tokens)
            raise QueueOverflowError(
                f"prompts of {self.num_tokens} tokens wait, {num_tokens} more would be beyond "
                f"max_num_queued_tokens={most_tokens}",
                wait_s,
            )

    def enter(self, num_reqs: int, num_tokens: int) -> None:
        """These wait from now on."""
        self.num_reqs += num_reqs
        self.num_tokens += num_tokens

    def start(self, num_tokens: int, now: float) -> None:
        """One of them has started, at `now` (seconds)."""
        self._starts.append((now, num_tokens))
        self.leave(1, num_tokens)

    def leave(self, num_reqs: int, num_tokens: int) -> None:
        """These wait no longer."""
        self.num_reqs -= num_reqs
        self.num_tokens -= num_tokens

    def estimate_retry_s(self) -> float:
        """When one more request might start, for a core that says it is full."""
        return self._seconds_until_left(1, 0)

    def _seconds_until_left(self, num_reqs: int, num_tokens: int) -> float:
        """At the rate of the last starts; a second where none is known."""
        if len(self._starts) < 2:
            return DEFAULT_RETRY_S
        seconds = self._starts[-1][0] - self._starts[0][0]
        # The first only marks the beginning.
        started = len(self._starts) - 1
        tokens = sum(count for _, count in self._starts) - self._starts[0][1]
        waits = [num_reqs * seconds / started]
        if num_tokens:
            waits.append(num_tokens * seconds / tokens if tokens else DEFAULT_RETRY_S)
        return min(max(waits), MAX_RETRY_S)


def _never(what: str, count: int, limit: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{count} {what} can never wait together: {limit}; ask for less at once, or start the "
        "engine with a larger limit"
    )
