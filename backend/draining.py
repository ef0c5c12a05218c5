"""The end of an engine that lets its requests finish first."""

from math import inf

from footplate.protocol.messages import ControlReply, Drain


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

    def ask(self, client: bytes, message: Drain, now: float) -> ControlReply | None:
        """Somebody asks, not necessarily the first. A deadline can be made earlier, not later.

        Returns:
            An answer if there is none to wait for: it cannot be done.
        """
        seconds = message.timeout_s
        if seconds is not None and not seconds >= 0:  # NaN neither
            why = f"timeout_s is {seconds}, must be at least 0"
            return ControlReply(message.call, False, why)
        self.is_on = True
        if seconds is not None:
            self.deadline = min(self.deadline, now + seconds)
        self._calls.append((client, message.call))
        return None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody is to be told when nothing is left."""
        return bool(self._calls)

    def take_replies(self, now: float, has_backlog: bool) -> list[tuple[bytes, ControlReply]]:
        """Nothing is left: whom to tell, and what; each reply is handed out once.

        Args:
            has_backlog: whether clients have still to take what they were told. They are waited
                for, but only until the deadline: one of them may never read.
        """
        if not self._calls or (has_backlog and now < self.deadline):
            return []
        calls, self._calls = self._calls, []
        return [(client, ControlReply(call, True)) for client, call in calls]
