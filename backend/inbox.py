"""The engine core's ear: one thread that receives what clients send.

A thread of its own, because a forward pass may take seconds: clients that come, and clients of
another version, are answered meanwhile, and frames are decoded while the model computes.
"""

import logging
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

import msgspec
import zmq
from msgspec.structs import replace

from footplate.backend import fail_points
from footplate.backend.discretion import without_places
from footplate.backend.engine_core import ClientId
from footplate.backend.flight_recorder import Suspects, suspects_of
from footplate.backend.gatekeeper import REFRESH_S, Gatekeeper
from footplate.backend.pulse import Pulse
from footplate.backend.roles import Peer, words_for_refusal
from footplate.protocol.codec import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    BadFrameError,
    Encoder,
    client_message_decoder,
    handle_of,
)
from footplate.protocol.config import SecurityConfig
from footplate.protocol.links import (
    accepts_output_endpoint,
    ipc_path,
    is_loopback,
    output_endpoint,
)
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    ClientMessage,
    Drain,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Progress,
    Refused,
    ResetPrefixCache,
    Welcome,
)

logger = logging.getLogger(__name__)

RECEIVE_HIGH_WATER_MARK = 10_000  # messages per client
SEND_HIGH_WATER_MARK = 16  # messages per client, of some 4 MiB at most (see `delivery`)
MAX_BATCH = 256  # messages handed over at once
MAX_BATCHES = 64  # handed over and not yet taken; then clients feel back pressure


@dataclass(frozen=True, slots=True)
class Joined:
    """A client has said Hello. Its PUSH socket changes hands with this event: from here on it
    belongs to whoever takes the event.

    Attributes:
        session: names the client across its connections; empty if nothing does.
        peer: who it is.
    """

    push: zmq.Socket[bytes]
    session: bytes
    peer: Peer


@dataclass(frozen=True, slots=True)
class Left:
    """A client has said Goodbye, its process is gone, or it was dismissed. The inbox has lost
    interest in its PUSH: the monitor, too, belongs to whoever takes the event.

    Attributes:
        for_good: it said Goodbye; otherwise its session may come back.
    """

    for_good: bool = False


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A request that cannot be decoded: a field of the wrong type or out of its bounds."""

    handle: int
    why: str


@dataclass(frozen=True, slots=True)
class Forbidden:
    """A control call by somebody whose role it is not."""

    call: int
    why: str


InboxEvent = tuple[ClientId, Joined | Left | Unreadable | Forbidden | ClientMessage]


class Inbox:
    """Owns the ROUTER and, until a client has joined, its PUSH. Knows who is here; knows nothing
    of requests."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        pulse: Pulse,
        suspects: Suspects = MappingProxyType({}),
        security: SecurityConfig = SecurityConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """Bind `address`.

        Args:
            suspects: what a Welcome says of the core before this one.

        Raises:
            zmq.ZMQError: that is impossible.
            EngineStartError: a file with keys is not right.
            InvalidParameterError: the link would let in whoever comes.
        """
        self.num_bad_messages = 0
        self._pulse = pulse
        self._suspects = suspects
        self._context = context
        self._address = address
        self._encoder = Encoder()
        self._decoder = client_message_decoder()
        self._batches: queue.Queue[list[InboxEvent]] = queue.Queue(MAX_BATCHES)
        self._monitors: dict[zmq.Socket[bytes], ClientId] = {}
        self._clients: dict[ClientId, Peer] = {}
        self._sessions: dict[ClientId, bytes] = {}  # of clients that have one
        # Who came while the core was starting.
        self._hopefuls: dict[ClientId, tuple[Peer, Hello]] = {}
        self._gatekeeper = Gatekeeper(context, address, security)
        self._to_dismiss: queue.SimpleQueue[tuple[ClientId, str]] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closing = False
        self._state: Progress | Welcome | Refused = Progress("starting", 0.0)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 1000)
        self._router.set(zmq.ROUTER_MANDATORY, 1)  # a vanished client is an error, not silence
        self._router.set(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        self._router.set(zmq.SNDHWM, RECEIVE_HIGH_WATER_MARK)
        self._router.set(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
        self._gatekeeper.guard(self._router)
        self._router.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        for socket in self._gatekeeper.sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    @property
    def num_rejected_peers(self) -> int:
        """Connections that were not let in."""
        return self._gatekeeper.num_rejected

    # ---- called by the main thread

    def announce(self, state: Progress | Welcome | Refused) -> None:
        """What a Hello is answered with from now on; whoever waits for it is told at once."""
        self._state = state
        os.write(self._wake_write, b"!")

    def dismiss(self, client: ClientId, reason: str) -> None:
        """Tell a client that it is served no longer; `Left` follows as if it had gone itself."""
        self._to_dismiss.put((client, reason))
        os.write(self._wake_write, b"!")

    def wake(self) -> None:
        """Make a `take` that waits return, and if none does, the next one. For any thread."""
        with suppress(queue.Full):  # then there is something to take
            self._batches.put_nowait([])

    def take(self, timeout_s: float | None) -> list[InboxEvent]:
        """All that has arrived. When there is nothing, wait: for ever on None, not at all on 0.

        Raises:
            RuntimeError: the thread has ended, which is a bug; the core must not live on deaf.
        """
        if self._failure is not None:
            raise RuntimeError("the inbox thread failed") from self._failure
        with suppress(queue.Empty):
            events = (
                self._batches.get_nowait()
                if timeout_s == 0
                else self._batches.get(timeout=timeout_s)
            )
            while True:
                try:
                    events += self._batches.get_nowait()
                except queue.Empty:
                    return events
        return []

    def close(self) -> bool:
        """End the thread and close its sockets; whether it did so in time."""
        self._closing = True
        os.write(self._wake_write, b"!")
        with suppress(queue.Empty):
            while True:
                self._batches.get_nowait()  # the thread may be waiting for room
        self._thread.join(timeout=1.0)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        try:
            while not self._closing:
                for ready, _ in self._poller.poll(self._patience_ms()):
                    self._serve(ready)
                if self._gatekeeper.refresh():
                    self._dismiss_revoked()
            if isinstance(self._state, Refused):
                # Announced just before the end, perhaps while this thread did something else.
                self._tell_hopefuls()
            self._router.close()  # the clients' monitors are the main thread's to close
            self._gatekeeper.close()
        except BaseException as error:
            self._failure = error
            self._batches.put([])  # wakes the main thread, which raises on its next turn

    def _patience_ms(self) -> int | None:
        """How long to wait for something to happen: for ever, unless a key may be revoked that
        somebody is here with."""
        if self._gatekeeper.has_keys and (self._clients or self._hopefuls):
            return int(1000 * REFRESH_S)
        return None

    def _serve(self, ready: object) -> None:
        if ready is self._router:
            self._receive()
        elif ready == self._wake_read:
            os.read(self._wake_read, 4096)
            self._tell_hopefuls()
            self._dismiss_all()
        elif ready in self._gatekeeper.sockets:
            self._gatekeeper.serve(ready)
        elif isinstance(ready, zmq.Socket):
            self._on_monitor(ready)

    def _receive(self) -> None:
        batch: list[InboxEvent] = []
        for _ in range(MAX_BATCH):
            try:
                peer, client, frames = self._gatekeeper.receive(self._router)
            except zmq.Again:
                break
            # A routing id is a claim; the key behind it was proved.
            if peer is None or self._clients.get(client, peer).key != peer.key:
                self._count_bad_message(
                    "a message of a key that is not this client's, or was revoked"
                )
                continue
            if fail_points.ENABLED:
                fail_points.reach("inbox.receive")
            if len(frames) > MAX_FRAMES:
                self._count_bad_message(f"{len(frames)} frames, the limit is {MAX_FRAMES}")
                continue
            for frame in frames:
                batch += self._read(client, peer, frame)
        if batch:
            self._batches.put(batch)

    def _read(self, client: ClientId, peer: Peer, frame: bytes) -> list[InboxEvent]:
        try:
            message = self._decoder.decode(frame)
        except BadFrameError as error:
            self._count_bad_message(str(error))
            if client in self._clients and (handle := handle_of(frame)) is not None:
                return [(client, Unreadable(handle, str(error)))]
            return []
        if isinstance(message, Hello):
            return self._greet(client, peer, message)
        if isinstance(message, Goodbye):
            # It may be gone already: its PULL closed first.
            return self._forget(client, for_good=True)
        if client not in self._clients:
            self._count_bad_message("a message from a client that has not said hello")
            return []
        if isinstance(message, Ping):
            self._answer_ping(client, message)
            return []
        if not peer.may_send(message):
            return self._forbid(client, peer, message)
        return [(client, message)]

    def _forbid(self, client: ClientId, peer: Peer, message: ClientMessage) -> list[InboxEvent]:
        why = words_for_refusal(peer, message)
        logger.warning("refused to %s: %s", peer.name, why)
        if isinstance(message, ResetPrefixCache | Drain):
            return [(client, Forbidden(message.call, why))]
        return []

    def _answer_ping(self, client: ClientId, ping: Ping) -> None:
        if isinstance(self._state, Welcome):  # otherwise it is about to end, and has said so
            epoch, pulse = self._state.epoch, self._pulse
            pong = Pong(ping.number, epoch, pulse.num_steps, pulse.is_busy, pulse.step_age_s)
            self._answer(client, pong)

    def _count_bad_message(self, why: str) -> None:
        self.num_bad_messages += 1
        if self.num_bad_messages.bit_count() == 1:  # at 1, 2, 4, 8, ...: a flood fills no log
            logger.warning("dropped bad message number %d: %s", self.num_bad_messages, why)

    def _greet(self, client: ClientId, peer: Peer, hello: Hello) -> list[InboxEvent]:
        ours = ".".join(map(str, PROTOCOL_VERSION))
        theirs = ".".join(map(str, hello.version))
        if hello.version[0] != PROTOCOL_VERSION[0]:
            reason = f"the engine core speaks protocol {ours}, the client {theirs}"
            self._answer(client, Refused("protocol", f"{reason}: install one release for both"))
        elif not accepts_output_endpoint(
            self._address, client, hello.output_endpoint, peer.host or "127.0.0.1"
        ):
            self._answer(client, Refused("hello", "the output endpoint is not the client's own"))
        elif isinstance(self._state, Welcome):
            return self._welcome(client, peer, hello)
        else:
            self._hopefuls[client] = peer, hello
            self._answer(client, as_told_to(peer, self._state))
        return []

    def _welcome(self, client: ClientId, peer: Peer, hello: Hello) -> list[InboxEvent]:
        assert isinstance(self._state, Welcome)
        session = _own_session(peer, hello)
        suspects = suspects_of(session, self._suspects)
        num_suspects = sum(map(len, self._suspects.values()))
        welcome = as_told_to(
            peer, replace(self._state, suspects=suspects, num_suspects=num_suspects)
        )
        if client in self._clients:  # it asked again before it saw the answer
            self._answer(client, welcome)
            return []
        try:
            push, monitor = self._connect_to(hello)
        except ValueError:
            self._answer(client, Refused("hello", "the output key is not a key"))
            return []
        except zmq.ZMQError as error:  # too many open files, or an address it cannot parse
            self._answer(client, Refused("hello", f"cannot connect to the client: {error}"))
            return []
        self._poller.register(monitor, zmq.POLLIN)
        self._monitors[monitor] = client
        left = self._supersede(session)
        self._clients[client] = peer
        if session:
            self._sessions[client] = session
        self._answer(client, welcome)
        return [*left, (client, Joined(push, session, peer))]

    def _supersede(self, session: bytes) -> list[InboxEvent]:
        """A session comes back: what is left of its old connection, if that has not been missed
        yet, is in its way."""
        events: list[InboxEvent] = []
        for client in [c for c, known in self._sessions.items() if session and known == session]:
            self._answer(client, Refused("superseded", "its session has another connection"))
            events += self._forget(client)
        return events

    def _connect_to(self, hello: Hello) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Raises ValueError if the link is encrypted and the client has named no key."""
        push: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        try:
            self._gatekeeper.secure_output(push, hello.output_key)
            push.set(zmq.LINGER, 1000)  # long enough for last words
            push.set(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
            # Two events that say that a client's process is gone: its PULL closed, or it was
            # never there (a client binds before it says Hello).
            monitor = push.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
            push.connect(hello.output_endpoint)
        except (zmq.ZMQError, ValueError):
            close_monitored(push, linger=0)
            raise
        return push, monitor

    def _forget(self, client: ClientId, *, for_good: bool = False) -> list[InboxEvent]:
        if client not in self._clients:
            return []
        del self._clients[client]
        self._sessions.pop(client, None)
        monitor = next(m for m, owner in self._monitors.items() if owner == client)
        del self._monitors[monitor]
        self._poller.unregister(monitor)
        if ipc_path(self._address):
            # A client that was killed could not remove its socket file.
            endpoint = output_endpoint(self._address, client)
            with suppress(OSError):  # it is gone, or something else is in its place
                Path(endpoint.removeprefix("ipc://")).unlink()
        return [(client, Left(for_good))]

    def _on_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        client = self._monitors.get(monitor)
        if client is not None and (events := self._forget(client)):
            self._batches.put(events)

    def _dismiss_all(self) -> None:
        while not self._to_dismiss.empty():
            client, reason = self._to_dismiss.get()
            self._answer(client, Refused("dismissed", reason))
            if events := self._forget(client):
                self._batches.put(events)

    def _dismiss_revoked(self) -> None:
        here = {client: peer for client, (peer, _) in self._hopefuls.items()} | self._clients
        for client, peer in here.items():
            if self._gatekeeper.still_lets_in(peer):
                continue
            logger.info("the key of %s has been revoked: a connection ends", peer.name)
            self._answer(client, Refused("revoked", f"the key of {peer.name} has been revoked"))
            self._hopefuls.pop(client, None)
            if events := self._forget(client):
                self._batches.put(events)

    def _tell_hopefuls(self) -> None:
        if isinstance(self._state, Welcome):
            joined: list[InboxEvent] = []
            for client, (peer, hello) in self._hopefuls.items():
                joined += self._welcome(client, peer, hello)
            self._hopefuls.clear()
            if joined:
                self._batches.put(joined)
        else:
            for client, (peer, _) in self._hopefuls.items():
                self._answer(client, as_told_to(peer, self._state))
            if isinstance(self._state, Refused):
                self._hopefuls.clear()  # there is nothing to hope for

    def _answer(self, client: ClientId, message: Progress | Welcome | Refused | Pong) -> None:
        with suppress(zmq.ZMQError):  # it is gone, or reads nothing
            self._router.send_multipart([client, self._encoder.encode(message)], zmq.NOBLOCK)


def as_told_to(peer: Peer, state: Progress | Welcome | Refused) -> Progress | Welcome | Refused:
    """What a peer is told of the core's state: its role, and of this machine only what is of use
    to it. A folder's name leads nowhere on another machine."""
    if isinstance(state, Refused):
        return state if peer.is_insider else Refused(state.kind, without_places(state.reason))
    if isinstance(state, Progress):
        return state
    if not peer.host or is_loopback(peer.host):
        return msgspec.structs.replace(state, role=peer.role)
    model = msgspec.structs.replace(
        state.model,
        model=Path(state.model.model).name,
        tokenizer=Path(state.model.tokenizer).name,
    )
    return msgspec.structs.replace(state, role=peer.role, model=model, process_id=0)


def _own_session(peer: Peer, hello: Hello) -> bytes:
    """The session of a client, in which nobody with another key can take part."""
    if not hello.session or not peer.key:
        return hello.session
    return blake2b(hello.session, key=peer.key.encode(), digest_size=16).digest()


def close_monitored(push: zmq.Socket[bytes], linger: int | None = None) -> None:
    """Close a PUSH and the socket that monitors it; `linger` in ms, None for its own.

    In this order: ZeroMQ's only I/O thread reports events with a blocking send. If it had one to
    report while the monitor is closed and its PUSH is not, the core would be deaf and dumb for
    good, to all clients.
    """
    monitor = push.get_monitor_socket()  # the one there is
    push.disable_monitor()
    monitor.close(linger=0)
    push.close(linger)
