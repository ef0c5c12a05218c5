"""When a request came, how urgent it is, and by when it must be served."""

import math
import time

import msgspec

from footplate.frontend.outputs import RequestMetrics
from footplate.protocol.bounds import require_int, require_number
from footplate.protocol.errors import InvalidRequestError
from footplate.protocol.messages import Limits


class RequestSchedule(msgspec.Struct, frozen=True, gc=False):
    """See the arguments of `AsyncLLMEngine.generate`."""

    priority: int = 0
    arrival_time: float | None = None
    ttft_deadline_s: float | None = None
    deadline_s: float | None = None

    def check(self, limits: Limits) -> None:
        """Refuse what makes no sense, or not with this engine.

        Raises:
            InvalidRequestError: priorities without their policy, or a value out of its bounds.
        """
        require_int("priority", self.priority, -(2**31), 2**31 - 1)
        if self.priority and limits.policy != "priority":
            raise InvalidRequestError(
                f"priority={self.priority} needs an engine with scheduling_policy='priority'"
            )
        if self.arrival_time is not None:
            require_number("arrival_time", self.arrival_time, 0.0, math.inf)
        if self.ttft_deadline_s is not None:
            require_number("ttft_deadline_s", self.ttft_deadline_s, 0.0, math.inf, above=True)
        if self.deadline_s is not None:
            require_number("deadline_s", self.deadline_s, 0.0, math.inf, above=True)

    def metrics(self) -> RequestMetrics:
        """The request's clock, started when it came; a time to come is now."""
        now, monotonic = time.time(), time.monotonic()
        if self.arrival_time is None:
            return RequestMetrics(now, monotonic)
        age_s = max(0.0, now - self.arrival_time)
        return RequestMetrics(now - age_s, monotonic - age_s)
