"""A session of the simulation: a client process that survives its cores, without asyncio."""

from collections.abc import Callable

from footplate.frontend.completion import Completion
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.recovery import Recovery
from footplate.frontend.stream import RequestStream
from footplate.protocol.errors import EngineDeadError
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Goodbye,
    Hello,
    StepOutputs,
    Welcome,
)

from .link import Link, decode_of_core


class RecoveringSession:
    """Owns one engine client and the connection that it has now.

    Attributes:
        is_serving: the core has said Welcome on this connection.
    """

    def __init__(
        self, name: bytes, connect: Callable[[bytes], Link], clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.client = EngineClient()
        self.recovery = Recovery(self.client)
        self._connect = connect
        self._clock = clock
        self._num_links = 0
        self._streams: dict[str, RequestStream] = {}
        self.link = self._open()

    def _open(self) -> Link:
        self.is_serving = False
        self._num_links += 1
        link = self._connect(b"%s/%d" % (self.name, self._num_links))
        link.say(Hello(PROTOCOL_VERSION, "", session=self.name), self._clock())
        return link

    # ---- what its user does

    def submit(self, stream: RequestStream, message: AddRequest) -> None:
        """Start a request; without a core, it is one of those that go on in the next."""
        self.client.open(stream)
        self.client.enqueue(stream, message)
        self._streams[stream.request_id] = stream
        if self.is_serving:
            self.link.say(message, self._clock())

    def abort(self, request_id: str) -> None:
        """End a request."""
        message = self.client.abort([request_id])
        if message is not None and self.is_serving:
            self.link.say(message, self._clock())

    def leave(self) -> None:
        """Say goodbye; the process ends."""
        self.link.say(Goodbye(), self._clock())
        self.link.close()

    # ---- what happens to it

    def on_lost(self) -> None:
        """The connection is gone, or the core is."""
        self.link.close()
        self.link = self._open()

    def on_dead(self) -> None:
        """There will be no other core."""
        self.link.close()
        self.client.fail_all(EngineDeadError("the restart budget is spent"))

    def hear_answer(self) -> Welcome | None:
        """Take one frame of the ROUTER; a Welcome, if it was one that is news."""
        message = decode_of_core(self.link.answers.popleft())
        assert isinstance(message, Welcome)
        if self.is_serving:
            return None
        self.is_serving = True
        for request in self.recovery.welcome(message, self._clock()):
            self.link.say(request, self._clock())
        return message

    def live(self) -> dict[int, Completion]:
        """Completions that have not ended, by handle."""
        self._streams = {name: s for name, s in self._streams.items() if not s.is_finished}
        completions = [c for stream in self._streams.values() for c in stream.completions]
        return {c.handle: c for c in completions if not c.is_finished}

    def hear_outputs(self, frame: bytes) -> None:
        """Take one frame of the PUSH. Between two connections there are none to take: of what the
        last one brought, some is lost."""
        message = decode_of_core(frame)
        assert isinstance(message, StepOutputs)
        if not self.is_serving or not self.recovery.accepts(message):
            return
        if over := self.client.handle(message, self._clock()):
            self.link.say(AbortRequests(over), self._clock())
