"""Clients without a session: they say what they like, and hear what they are told to."""

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from footplate.frontend.link_keys import new_key_pair
from footplate.protocol.codec import Encoder, core_message_decoder
from footplate.protocol.keys import ClientKeys
from footplate.protocol.links import new_client_id, output_endpoint
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    ControlReply,
    CoreMessage,
    GetStats,
    Hello,
    Message,
    Progress,
    Stats,
    Welcome,
)

from .conftest import PATIENCE_S

PATIENCE_MS = int(1000 * PATIENCE_S)


class RawClient:
    """A client that says what it likes, and reads only what it is told to."""

    def __init__(self, address: str, client_id: bytes | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._decode = core_message_decoder().decode
        self._encode = Encoder().encode
        self.client_id = client_id or new_client_id()
        self.output_key = ""
        self.pull = self._context.socket(zmq.PULL)
        self.dealer = self._context.socket(zmq.DEALER)
        self.dealer.set(zmq.ROUTING_ID, self.client_id)
        self.endpoint = self._bind(address)
        self.dealer.connect(address)

    def _bind(self, address: str) -> str:
        """Make both sockets ready; where outputs are to go."""
        endpoint = output_endpoint(address, self.client_id)
        self.pull.set(zmq.RCVHWM, 1)
        self.pull.bind(endpoint)
        return endpoint

    def hello(self, session: bytes = b"") -> Hello:
        return Hello(PROTOCOL_VERSION, self.endpoint, session, self.output_key)

    def say(self, *frames: Message | bytes) -> None:
        self.dealer.send_multipart(
            [frame if isinstance(frame, bytes) else self._encode(frame) for frame in frames]
        )

    def hear(self) -> CoreMessage:
        assert self.dealer.poll(PATIENCE_MS), "the core does not answer"
        return self._decode(self.dealer.recv())

    def hear_output(self) -> CoreMessage:
        assert self.pull.poll(PATIENCE_MS), "the core does not answer"
        return self._decode(self.pull.recv())

    def join(self, session: bytes = b"") -> Welcome:
        """Say Hello; what answers it when the core is ready."""
        self.say(self.hello(session))
        while not isinstance(answer := self.hear(), Welcome):
            assert isinstance(answer, Progress)
        return answer

    def stats(self) -> Stats:
        self.say(GetStats(1))
        reply = self.hear_output()
        assert isinstance(reply, ControlReply) and reply.stats is not None
        return reply.stats

    def close(self) -> None:
        self._context.destroy(linger=0)


class CurveClient(RawClient):
    """One with keys, over tcp."""

    def __init__(self, address: str, keys: ClientKeys, client_id: bytes | None = None) -> None:
        self._keys = keys
        super().__init__(address, client_id)

    def _bind(self, address: str) -> str:
        output_keys, keys = new_key_pair(), self._keys
        self.output_key = output_keys.public_key
        self.pull.set(zmq.CURVE_SERVER, 1)
        self.pull.set(zmq.CURVE_SECRETKEY, output_keys.secret_key.encode())
        self.pull.bind("tcp://127.0.0.1:*")
        self.dealer.set(zmq.CURVE_SERVERKEY, keys.server_public_key.encode())
        self.dealer.set(zmq.CURVE_PUBLICKEY, keys.public_key.encode())
        self.dealer.set(zmq.CURVE_SECRETKEY, keys.secret_key.encode())
        return str(self.pull.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")


@contextmanager
def raw_client(address: str, client_id: bytes | None = None) -> Iterator[RawClient]:
    client = RawClient(address, client_id)
    try:
        yield client
    finally:
        client.close()
