"""The engine core's voice: one PUSH per client, and a byte budget for those who do not listen."""

import logging
import time
from collections import deque
from dataclasses import dataclass, field

import zmq

from footplate.backend.engine_core import ClientId
from footplate.backend.inbox import close_monitored

logger = logging.getLogger(__name__)

LAST_WORDS_S = 0.5
# Within what a supervisor gives a core that it has told to end.
MOST_LAST_WORDS_S = 10.0


@dataclass(slots=True)
class _Lane:
    push: zmq.Socket[bytes]
    is_insider: bool = True
    backlog: deque[bytes] = field(default_factory=deque)
    backlog_bytes: int = 0


class Outbox:
    """Owns the PUSH sockets of the clients that have joined. Never blocks: a client that stops
    reading costs its budget, then it is told nothing more and `send` says so.

    Args:
        max_unread_bytes: what one client may leave unread, beyond its socket's high-water mark.
    """

    def __init__(self, max_unread_bytes: int) -> None:
        self._max_unread_bytes = max_unread_bytes
        self._lanes: dict[ClientId, _Lane] = {}

    @property
    def has_backlog(self) -> bool:
        """Whether `flush` might get rid of something."""
        return any(lane.backlog for lane in self._lanes.values())

    def join(self, client: ClientId, push: zmq.Socket[bytes], is_insider: bool = True) -> None:
        """Take over the socket of a client that has come.

        Args:
            is_insider: it may be told of paths and process ids.
        """
        self._lanes[client] = _Lane(push, is_insider)

    def is_insider(self, client: ClientId) -> bool:
        """Whether a client may be told of paths and process ids."""
        lane = self._lanes.get(client)
        return lane is not None and lane.is_insider

    def leave(self, client: ClientId) -> None:
        """Close the socket of a client that has gone. Unknown clients are no error."""
        if lane := self._lanes.pop(client, None):
            close_monitored(lane.push, linger=0)

    def send(self, client: ClientId, frame: bytes) -> bool:
        """Send or keep one frame; False when the client's budget is spent. Then it is time to
        dismiss the client."""
        lane = self._lanes.get(client)
        if lane is None:
            return True  # it left; there is nobody to tell, and nothing went wrong
        if not lane.backlog and _push(lane, frame):
            return True
        if lane.backlog_bytes + len(frame) > self._max_unread_bytes:
            logger.warning("a client left %d bytes unread: dropped", lane.backlog_bytes)
            return False
        lane.backlog.append(frame)
        lane.backlog_bytes += len(frame)
        return True

    def flush(self) -> bool:
        """Send what could not be sent before, in order; whether anything was."""
        has_sent = False
        for lane in self._lanes.values():
            while lane.backlog and _push(lane, lane.backlog[0]):
                lane.backlog_bytes -= len(lane.backlog.popleft())
                has_sent = True
        return has_sent

    def broadcast(
        self, frame: bytes, frame_for_outsiders: bytes, patience_s: float = LAST_WORDS_S
    ) -> None:
        """Tell everyone the last words, behind all that is to be said before; those who read get
        them, and may be thousands of steps behind.

        Args:
            patience_s: the longest that is waited for somebody to take something.
        """
        for lane in self._lanes.values():
            words = frame if lane.is_insider else frame_for_outsiders
            lane.backlog.append(words)
            lane.backlog_bytes += len(words)
        begun = last = time.monotonic()
        self.flush()
        while self.has_backlog and (now := time.monotonic()) - last < patience_s:
            if now - begun > MOST_LAST_WORDS_S:
                break
            time.sleep(LAST_WORDS_S / 50)
            if self.flush():
                last = time.monotonic()

    def close(self) -> None:
        """Close all sockets; what they hold is still delivered within their linger time. Nobody
        looks at the monitors any more."""
        for lane in self._lanes.values():
            close_monitored(lane.push)
        self._lanes.clear()


def _push(lane: _Lane, frame: bytes) -> bool:
    try:
        lane.push.send(frame, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
