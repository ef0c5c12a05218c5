"""The core's end of the link, played by a test: it answers when it has heard, never by timing."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import zmq
import zmq.asyncio

from footplate.protocol.codec import Encoder, client_message_decoder
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    ClientMessage,
    Finished,
    FinishReason,
    Hello,
    Limits,
    Message,
    ModelFacts,
    Ping,
    Pong,
    Refused,
    StepOutputs,
    Welcome,
)

PATIENCE_S = 5.0
EPOCH = 9
WELCOME = Welcome(
    epoch=EPOCH,
    version=PROTOCOL_VERSION,
    model=ModelFacts("scripted", "/none", "None", 1000, 100, (), "none", "cpu", "none"),
    limits=Limits(256, 512, "fcfs", 16, 100, True),
    process_id=1,
    phases={"loading": 0.5},
)


class ScriptedCore:
    """Binds a ROUTER; after `accept` it has a PUSH to the one client it talks to.

    Attributes:
        num_frames: of each ZeroMQ message that was heard; every frame is a message of ours.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.hello: Hello | None = None
        self._context = zmq.asyncio.Context()
        self._encode = Encoder().encode
        self._decode = client_message_decoder().decode
        self._client = b""
        self._frames: list[bytes] = []
        self.num_frames: list[int] = []
        self._router = self._context.socket(zmq.ROUTER)
        self._push = self._context.socket(zmq.PUSH)
        self._router.bind(address)

    @classmethod
    @contextmanager
    def at(cls, address: str) -> Iterator[Self]:
        core = cls(address)
        try:
            yield core
        finally:
            core.close()

    def close(self) -> None:
        """Vanish, as a killed process does; what has been pushed is still delivered."""
        if not self._context.closed:
            self._router.close(linger=0)
            self._push.close(linger=1000)
            self._context.term()

    def close_router(self) -> None:
        """The first thing that a core does when it ends."""
        self._router.close(linger=0)

    def close_push(self) -> None:
        """What has been pushed is still delivered."""
        self._push.close(linger=1000)

    async def dismiss(self, reason: str) -> None:
        """Serve the client no longer."""
        await self.answer(Refused("dismissed", reason))
        self.close_push()

    async def hear(self) -> ClientMessage:
        """The client's next message; pings are answered in passing, by a core that is idle."""
        while True:
            if not self._frames:
                async with asyncio.timeout(PATIENCE_S):
                    self._client, *self._frames = await self._router.recv_multipart()
                self.num_frames.append(len(self._frames))
            message = self._decode(self._frames.pop(0))
            if not isinstance(message, Ping):
                return message
            self.num_frames.pop()
            await self.answer(Pong(message.number, EPOCH, 0, False, 0.0))

    async def hear_hello(self) -> Hello:
        self.hello = await self.hear()  # type: ignore[assignment]
        assert isinstance(self.hello, Hello)
        return self.hello

    async def accept(self, welcome: Welcome = WELCOME) -> None:
        """Hear Hello, connect back, say Welcome."""
        hello = await self.hear_hello()
        self._push.close(linger=0)  # to the connection before
        self._push = self._context.socket(zmq.PUSH)
        self._push.connect(hello.output_endpoint)
        await self.answer(welcome)

    async def answer(self, message: Message | bytes) -> None:
        """Send on the ROUTER, as what answers Hello is sent."""
        frame = message if isinstance(message, bytes) else self._encode(message)
        await self._router.send_multipart([self._client, frame])

    async def push(self, message: Message | bytes) -> None:
        """Send on the PUSH, as outputs are sent."""
        frame = message if isinstance(message, bytes) else self._encode(message)
        await self._push.send(frame)

    async def hear_request(self) -> AddRequest:
        request = await self.hear()
        assert isinstance(request, AddRequest)
        return request

    async def push_tokens(
        self, handle: int, position: int, *token_ids: int, epoch: int = EPOCH
    ) -> None:
        await self.push(StepOutputs(epoch, [handle], [position], list(token_ids), [len(token_ids)]))

    async def push_end(self, handle: int, reason: FinishReason, message: str = "") -> None:
        finished = [Finished(handle, reason, message)]
        await self.push(StepOutputs(EPOCH, [], [], [], finished=finished))
