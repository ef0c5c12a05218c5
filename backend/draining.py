"""The end of an engine that lets its requests finish first."""

from math import inf


class Draining:
    """Owns whether the engine takes new requests, until when those that it has may go on, and who
    waits for the last of them.

    There is no way back: whoever drains an engine ends it.

    Attributes:
        is_on: whether somebody has asked for it.
        deadline: when what is left ends, on the core's clock; infinity is never.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.deadline = inf
        self._calls: list[tuple[bytes, int]] = []

    def begin(self, client: bytes, call: int, deadline: float | None) -> None:
        """Somebody asks, not necessarily the first. A deadline can be made earlier, not later."""
        self.is_on = True
        if deadline is not None:
            self.deadline = min(self.deadline, deadline)
        self._calls.append((client, call))

    @property
    def is_awaited(self) -> bool:
        """Whether somebody is to be told when nothing is left."""
        return bool(self._calls)

    def take_calls(self) -> list[tuple[bytes, int]]:
        """Nothing is left: whom to tell, and under which number."""
        calls, self._calls = self._calls, []
        return calls
