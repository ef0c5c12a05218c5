"""One connection between a client and the engine core, in memory.

Every pipe keeps its order, as ZeroMQ's do, and no pipe waits for another: DEALER to ROUTER, ROUTER
to DEALER, PUSH to PULL, of each client for itself. What is under way when an end dies is lost from
some point on, never in the middle. Frames are real ones.
"""

from collections import deque
from random import Random
from typing import TYPE_CHECKING

from footplate.protocol.codec import Encoder, client_message_decoder, core_message_decoder
from footplate.protocol.messages import Message

if TYPE_CHECKING:
    from .core_host import CoreHost

encode = Encoder().encode
decode_of_client = client_message_decoder().decode
decode_of_core = core_message_decoder().decode


class Link:
    """Owns what is under way between a client's sockets and the core that serves them.

    Attributes:
        routing_id: names the connection; the session's name stands before the slash.
        host: the core that has heard of it; None before.
        is_closed: the client has let go of it.
        is_cut: nothing goes through any more.
    """

    def __init__(self, routing_id: bytes) -> None:
        self.routing_id = routing_id
        self.host: CoreHost | None = None
        self.is_closed = False
        self.is_cut = False
        self.to_core: deque[tuple[float, bytes]] = deque()  # with the time of sending
        self.answers: deque[bytes] = deque()
        self.outputs: deque[bytes] = deque()

    def say(self, message: Message, now: float) -> None:
        """From the client to the core."""
        if not self.is_cut:
            self.to_core.append((now, encode(message)))

    def answer(self, message: Message) -> None:
        """From the core's ROUTER to the client."""
        if not self.is_cut and not self.is_closed:
            self.answers.append(encode(message))

    def push(self, message: Message) -> None:
        """From the core's PUSH to the client."""
        if not self.is_cut and not self.is_closed:
            self.outputs.append(encode(message))

    def cut(self, random: Random) -> None:
        """What is under way is lost from some point on; what is before it still arrives."""
        self.is_cut = True
        self.to_core.clear()
        for pipe in (self.answers, self.outputs):
            for _ in range(min(len(pipe), random.choice((0, 1, 1, 2, 100)))):
                pipe.pop()

    def close(self) -> None:
        """The client reads no more; what it has sent still arrives."""
        self.is_closed = True
        self.answers.clear()
        self.outputs.clear()


def session_of(routing_id: bytes) -> bytes:
    """The session that a connection is one of."""
    return routing_id.partition(b"/")[0]
