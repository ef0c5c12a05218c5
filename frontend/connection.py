"""The client's end of the link: two sockets on an asyncio event loop.

Plain sockets and their file descriptors, not zmq.asyncio: one wake-up drains all that has
arrived, where zmq.asyncio would cost a future per message.
"""

import asyncio
import os
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import zmq

from footplate.frontend.link_keys import new_key_pair, own_host
from footplate.frontend.loss import Loss, LossKind
from footplate.protocol.codec import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    BadFrameError,
    Encoder,
    core_message_decoder,
)
from footplate.protocol.errors import (
    EngineStartError,
    KeyRefusedError,
    ProtocolMismatchError,
)
from footplate.protocol.keys import ClientKeys
from footplate.protocol.links import (
    address_to_connect,
    ipc_path,
    new_client_id,
    output_endpoint,
    require_owned_dir,
    require_protected,
)
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    CoreMessage,
    Goodbye,
    Hello,
    Message,
    Pong,
    Progress,
    Refused,
    Welcome,
)

RECEIVE_HIGH_WATER_MARK = 1_000  # steps
SEND_HIGH_WATER_MARK = 10_000  # requests and aborts
MAX_MESSAGES_PER_TURN = 64  # then the event loop gets a turn
RECONNECT_MS = 10
MONITOR_EVENT = struct.Struct("=HI")  # zmq_socket_monitor(3): the event and its value
UNSENT_RETRY_S = 0.001
LAST_WORDS_S = 3.0  # as long as a core that ends goes on delivering


class Connection:
    """Owns the DEALER, the PULL and the client's identity. Use from one event loop.

    Knows messages and nothing of requests: what comes is handed on, what goes is queued in order.
    """

    def __init__(
        self,
        address: str,
        session: bytes,
        on_messages: Callable[[list[CoreMessage]], None],
        on_lost: Callable[[Loss], None],
        on_progress: Callable[[Progress], None],
        keys: ClientKeys | None = None,
    ) -> None:
        """Args:
        session: names this client to the core beyond this connection.
        on_messages: called with all that one wake-up of the event loop brought, in order.
        on_lost: called once, behind all that came, when the core has closed the link, or serves
            us no longer. While `open` waits it goes on waiting, until it is told to `refuse`.
        keys: of an encrypted link. Without, it stays on this machine.

        Raises:
            EngineStartError: there is no way to the address, or others may be listening there.
            InvalidParameterError: the address makes no sense, or cannot do without keys.
        """
        self.num_bad_messages = 0
        require_protected(
            address,
            has_keys=keys is not None,
            # Its owner has said so, or there would be keys; but only on this machine.
            insecure_tcp=keys is None and ipc_path(address) is None,
        )
        address = address_to_connect(address)
        self._address = address
        self._session = session
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self._encode = Encoder().encode
        self._decode = core_message_decoder().decode
        self._welcome: asyncio.Future[Welcome] = self._loop.create_future()
        self._refusal: EngineStartError | None = None
        self._lost: Loss | None = None
        self._has_ended = False
        self._num_feeds = 0  # connections by which outputs come
        self._unsent: deque[list[bytes]] = deque()
        self._gathered: list[bytes] = []
        self._room: asyncio.Future[None] | None = None
        client_id = new_client_id()
        endpoint = output_endpoint(address, client_id, own_host(address))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._socket(zmq.DEALER)
        self._dealer.set(zmq.ROUTING_ID, client_id)
        self._dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._monitor = self._dealer.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self._pull = self._socket(zmq.PULL)
        self._feed_monitor = self._pull.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )
        self._output_key = "" if keys is None else self._encrypt(keys)
        path = Path(endpoint.removeprefix("ipc://")) if ipc_path(address) else None
        try:
            if path:
                _require_place(path.parent, address)
            self._pull.bind(endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        if path:
            path.chmod(0o600)  # the folder keeps others out already; this says so again
        self._endpoint = cast(bytes, self._pull.get(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        # The finalizer holds the sockets: those of a connection that was dropped may be gone from
        # the context's own list, and ending a context waits for sockets that nobody can close.
        sockets = (self._dealer, self._pull, self._monitor, self._feed_monitor)
        self._finalizer = weakref.finalize(self, _close, self._context, sockets, path, os.getpid())

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        socket.set(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        socket.set(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        return socket

    def _encrypt(self, keys: ClientKeys) -> str:
        """Let the DEALER prove who we are, to that very core alone, and the PULL take what comes
        from whoever knows its public key.

        Nobody learns that key from the wire: it is fresh, it goes to the core alone, in Hello, and
        the handshake of who knows it does not show it (curvezmq.org, "Hello Command").

        Returns:
            It.
        """
        self._dealer.set(zmq.CURVE_SERVERKEY, keys.server_public_key.encode())
        self._dealer.set(zmq.CURVE_PUBLICKEY, keys.public_key.encode())
        self._dealer.set(zmq.CURVE_SECRETKEY, keys.secret_key.encode())
        output_keys = new_key_pair()
        self._pull.set(zmq.CURVE_SERVER, 1)
        self._pull.set(zmq.CURVE_SECRETKEY, output_keys.secret_key.encode())
        return output_keys.public_key

    # ---- life

    async def open(self, timeout_s: float) -> Welcome:
        """Say Hello and wait until the core is ready.

        Raises:
            EngineStartError: it could not start, or did not answer in time.
            ProtocolMismatchError: it speaks another version.
            KeyRefusedError: it does not let our key in.
        """
        for socket, read in (
            (self._dealer, self._read_dealer),
            (self._pull, self._read_pull),
            (self._monitor, self._read_monitor),
            (self._feed_monitor, self._read_feed_monitor),
        ):
            self._loop.add_reader(cast(int, socket.get(zmq.FD)), read)
            read()  # a descriptor reports nothing before its socket has been found empty once
        self._dealer.connect(self._address)
        self.send(Hello(PROTOCOL_VERSION, self._endpoint, self._session, self._output_key))
        try:
            async with asyncio.timeout(timeout_s):
                welcome = await self._welcome
        except TimeoutError:
            raise EngineStartError(
                f"no engine on {self._address} was ready within {timeout_s:g} s: is one running?"
            ) from None
        if self._refusal is not None:
            raise self._refusal
        return welcome

    def refuse(self, error: EngineStartError) -> None:
        """Let `open` fail: the core is known to be gone."""
        if not self._welcome.done():
            self._welcome.set_exception(error)
        else:
            self._refusal = error  # it has been welcomed, and has not had its turn since

    def close(self, *, takes_leave: bool = True, may_return: bool = False) -> None:
        """Close the sockets. May be called more than once.

        Args:
            takes_leave: deliver what was said last, and a Goodbye, which may take 0.1 s if nobody
                is there to hear it.
            may_return: say no Goodbye, so that the core keeps what outlives a connection.
        """
        if not self._finalizer.alive:
            return
        for socket in (self._dealer, self._pull, self._monitor, self._feed_monitor):
            with suppress(RuntimeError):  # the loop is closed already
                self._loop.remove_reader(cast(int, socket.get(zmq.FD)))
        if takes_leave and not self._lost:
            with suppress(zmq.ZMQError):
                self._dealer.set(zmq.LINGER, 100)  # ms; what was said last may still be on its way
                if not may_return:
                    self._dealer.send(self._encode(Goodbye()), zmq.NOBLOCK)
        self._gathered.clear()
        self._unsent.clear()
        with suppress(RuntimeError):  # likewise: nobody waits any more
            self._tell_room()
            self._welcome.cancel()
        self._finalizer()

    # ---- sending

    def send(self, message: Message, *, gather: bool = False) -> None:
        """Queue one message; never blocks. Raises MessageTooLargeError.

        Args:
            gather: wait for others that are sent so in this turn of the event loop. The core takes
                all of them, or none, between two of its steps.
        """
        frame = self._encode(message)
        if gather:
            if not self._gathered:
                self._loop.call_soon(self._send_gathered)
            self._gathered.append(frame)
        else:
            self._send_gathered()  # an abort must not overtake its request
            self._send([frame])

    def _send_gathered(self) -> None:
        frames, self._gathered = self._gathered, []
        for first in range(0, len(frames), MAX_FRAMES):
            self._send(frames[first : first + MAX_FRAMES])

    def _send(self, frames: list[bytes]) -> None:
        if self._unsent or not self._try_send(frames):
            if not self._unsent:
                self._loop.call_later(UNSENT_RETRY_S, self._send_unsent)
            self._unsent.append(frames)

    def send_now(self, message: Message) -> None:
        """Send one message, or nothing: for what is of no use later."""
        with suppress(zmq.ZMQError):
            self._dealer.send(self._encode(message), zmq.NOBLOCK)
            self._look_again()

    async def has_room(self) -> None:
        """Wait until the core has taken what `send` could not get rid of."""
        while self._unsent:
            if self._room is None:
                self._room = self._loop.create_future()
            await asyncio.shield(self._room)

    def _try_send(self, frames: list[bytes]) -> bool:
        try:
            self._dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._look_again()
        return True

    def _look_again(self) -> None:
        # A send may swallow the edge by which the file descriptor reports an arrival.
        if cast(int, self._dealer.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read_dealer)

    def _send_unsent(self) -> None:
        while self._unsent and not self._dealer.closed and self._try_send(self._unsent[0]):
            self._unsent.popleft()
        if self._unsent and not self._dealer.closed:
            self._loop.call_later(UNSENT_RETRY_S, self._send_unsent)
        else:
            self._tell_room()

    def _tell_room(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    # ---- receiving

    def _read_pull(self) -> None:
        messages = self._receive(self._pull, self._read_pull)
        if messages:
            self._on_messages(messages)

    def _read_dealer(self) -> None:
        for message in self._receive(self._dealer, self._read_dealer):
            match message:
                case Progress():
                    self._on_progress(message)
                case Pong():
                    self._on_messages([message])
                case Refused(kind="superseded") if self._welcome.done():
                    self._on_messages([message])
                case Welcome() if not self._welcome.done():
                    self._welcome.set_result(message)
                case Refused(kind=kind, reason=reason) if self._welcome.done():
                    is_dismissal = kind == "dismissed"
                    self._lose(Loss(reason, LossKind.DISMISSED if is_dismissal else LossKind.GONE))
                case Refused(kind=kind, reason=reason):
                    error = ProtocolMismatchError if kind == "protocol" else EngineStartError
                    self.refuse(error(reason))

    def _receive(
        self, socket: zmq.Socket[bytes], read_again: Callable[[], None]
    ) -> list[CoreMessage]:
        messages: list[CoreMessage] = []
        if socket.closed:
            return messages
        for _ in range(MAX_MESSAGES_PER_TURN):
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            except zmq.ZMQError:
                return messages  # closed under our hands, by a finalizer at the program's end
            try:
                messages.append(self._decode(frame))
            except BadFrameError:
                self.num_bad_messages += 1
        # The descriptor reports edges, not levels: what is left here would not be reported.
        self._loop.call_soon(read_again)
        return messages

    def _read_monitor(self) -> None:
        with suppress(zmq.Again):
            while not self._monitor.closed:
                event, _ = MONITOR_EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
                self._lost = self._lost or Loss("the engine core closed the connection")
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self.refuse(
                        KeyRefusedError(
                            f"the engine on {self._address} does not let this key in: ask its "
                            "owner for another"
                        )
                    )
        if self._lost:
            self._lose(self._lost)

    def _lose(self, loss: Loss) -> None:
        self._lost = loss
        # Its last words come by the other sockets. A core that ends closes this one first, and one
        # that dismisses us says so first.
        self._loop.call_later(LAST_WORDS_S, self._end)
        self._read_feed_monitor()

    def _read_feed_monitor(self) -> None:
        with suppress(zmq.Again):
            while not self._feed_monitor.closed:
                event, _ = MONITOR_EVENT.unpack(self._feed_monitor.recv_multipart(zmq.NOBLOCK)[0])
                self._num_feeds += 1 if event == zmq.EVENT_ACCEPTED else -1
        if self._lost and not self._num_feeds:
            self._end()

    def _end(self) -> None:
        """All that is going to come has come."""
        if self._has_ended or self._lost is None:
            return
        self._has_ended = True
        for socket, read in ((self._dealer, self._read_dealer), (self._pull, self._read_pull)):
            while not socket.closed and cast(int, socket.get(zmq.EVENTS)) & zmq.POLLIN:
                read()
        # What was read just now may have had this connection closed, and another opened.
        if self._finalizer.alive:
            self._on_lost(self._lost)


def _require_place(folder: Path, address: str) -> None:
    """Raise EngineStartError if there is no folder for the sockets, or it is not ours alone."""
    if not folder.is_dir():
        raise EngineStartError(f"no engine listens on {address}: start one, then connect")
    require_owned_dir(folder)


def _close(
    context: "zmq.Context[zmq.Socket[bytes]]",
    sockets: tuple[zmq.Socket[bytes], ...],
    path: Path | None,
    owner: int,
) -> None:
    if os.getpid() != owner:
        return  # in a fork of its owner: the sockets are not this process's
    for socket in sockets:
        socket.close()
    context.term()
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
