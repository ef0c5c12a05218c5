"""How many connections were not let in, from what ZeroMQ reports of a socket."""

import zmq

WATCHED_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


class Rejections:
    """Counts connections that ended without a handshake. Not all of them are reported as failed:
    of what does not even begin like ZeroMQ there is only an end. And only beginning and end name
    the connection, so while several shake hands at once, which of them did well may be settled in
    the wrong order; the sum is right.

    Attributes:
        num: of those that were not let in.
    """

    def __init__(self) -> None:
        self.num = 0
        self._undecided: set[int] = set()  # file descriptors
        self._num_failed = 0  # among the undecided: reported, and not ended yet
        self._num_succeeded = 0  # among the undecided

    def on_event(self, event: int, descriptor: int) -> bool:
        """Take in one event; whether it makes the count grow."""
        before = self.num
        if event == zmq.EVENT_ACCEPTED:
            self._undecided.add(descriptor)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_succeeded += 1
        elif event == zmq.EVENT_DISCONNECTED:
            self._on_end(descriptor)
        else:
            self.num += 1
            self._num_failed += 1
        if not self._num_failed and len(self._undecided) == self._num_succeeded:
            self._undecided.clear()
            self._num_succeeded = 0
        return self.num > before

    def _on_end(self, descriptor: int) -> None:
        if descriptor not in self._undecided:
            return  # it was let in
        self._undecided.remove(descriptor)
        if self._num_failed:
            self._num_failed -= 1
        elif self._num_succeeded:
            self._num_succeeded -= 1
        else:
            self.num += 1
