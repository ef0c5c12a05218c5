"""How many connections were not let in, from what ZeroMQ reports of a socket."""

import zmq

# Not the failures of handshakes. They are not complete: what does not even begin like ZeroMQ has
# none. And reporting EVENT_HANDSHAKE_FAILED_PROTOCOL costs libzmq (4.3.5) its errno: it then takes
# a forged frame for back pressure, and keeps a connection that it should close.
WATCHED_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class Rejections:
    """Counts connections that ended without a handshake. Only beginning and end of a connection
    name it, so while several shake hands at once, which of them did well may be settled in the
    wrong order; the sum is right.

    Attributes:
        num: of those that were not let in.
    """

    def __init__(self) -> None:
        self.num = 0
        self._undecided: set[int] = set()  # file descriptors
        self._num_succeeded = 0  # among the undecided

    def on_event(self, event: int, descriptor: int) -> bool:
        """Take in one event; whether it makes the count grow."""
        before = self.num
        if event == zmq.EVENT_ACCEPTED:
            self._undecided.add(descriptor)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
        elif descriptor in self._undecided:
            self._undecided.remove(descriptor)
            if self._num_succeeded:
                self._num_succeeded -= 1
            else:
                self.num += 1
        if len(self._undecided) == self._num_succeeded:
            self._undecided.clear()
            self._num_succeeded = 0
        return self.num > before
