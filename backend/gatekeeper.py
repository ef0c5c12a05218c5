"""Who may come in: answers ZeroMQ's question about every new connection, before a frame of it is
read, and knows who is behind each message.

Over ipc a peer must run as the core's own user (the kernel says who it is). Over tcp it must prove
that it has a key that the key ring knows (CURVE, rfc.zeromq.org/spec/26), or, where the owner has
said so, be on this machine.
"""

import logging
import os
import struct
import time
from itertools import count
from pathlib import Path

import zmq
from zmq.utils import z85

from footplate.backend.keyring import OWNER, Keyring
from footplate.backend.rejections import WATCHED_EVENTS, Rejections
from footplate.backend.roles import Peer
from footplate.protocol.config import SecurityConfig
from footplate.protocol.keys import KeyPair, is_key, read_server_key
from footplate.protocol.links import ipc_path, is_loopback, require_owned_dir, require_protected

logger = logging.getLogger(__name__)

# The name of the socket is ZeroMQ's (ZAP, rfc.zeromq.org/spec/27).
ZAP_ENDPOINT = "inproc://zeromq.zap.01"
HANDSHAKE_TIMEOUT_MS = 10_000  # who connects and says nothing costs a file descriptor so long
# From the removal of a key's file to the end of its connections, at most.
REFRESH_S = 0.5
MAX_KNOWN_PEERS = 1_000
MONITOR_EVENT = struct.Struct("=HI")  # zmq_socket_monitor(3); pyzmq's reader brings asyncio along
_LOCAL_PEER = Peer()
_names = count()


class Gatekeeper:
    """Owns the ZAP socket, the monitor of the guarded socket, the key ring and the count of those
    who were not let in. Used by one thread, which polls `sockets`."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, security: SecurityConfig
    ) -> None:
        """Raises:
        InvalidParameterError: the link would let in whoever comes.
        EngineStartError: a key file, or the folder of the keys, is not right.
        """
        require_protected(
            address, has_keys=security.key_dir is not None, insecure_tcp=security.insecure_tcp
        )
        self._is_ipc = ipc_path(address) is not None
        self._keyring: Keyring | None = None
        self._keys: KeyPair | None = None
        if security.key_dir is not None:
            key_dir = Path(security.key_dir)
            self._keys = read_server_key(key_dir)
            require_owned_dir(key_dir)
            self._keyring = Keyring(key_dir, security.owner_key)
        self._context = context
        self._rejections = Rejections()
        self._peers: dict[tuple[str, str], Peer | None] = {}
        self._refreshed_at = time.monotonic()
        self._has_changed = False  # since the last `refresh`
        self._zap: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        self._zap.bind(ZAP_ENDPOINT)
        self._monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._monitor.set(zmq.LINGER, 0)
        # The I/O thread reports events with a blocking send: there must always be room.
        self._monitor.set(zmq.RCVHWM, 0)

    @property
    def sockets(self) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
        """What is to be polled; what is ready is to be `serve`d."""
        return self._zap, self._monitor

    @property
    def has_keys(self) -> bool:
        """Whether peers prove who they are, and links are encrypted."""
        return self._keyring is not None

    @property
    def num_rejected(self) -> int:
        """Connections that were not let in."""
        return self._rejections.num

    def guard(self, socket: "zmq.Socket[bytes]") -> None:
        """Let nobody in unasked to this socket, which is to be bound hereafter."""
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        socket.set(zmq.ZAP_DOMAIN, b"footplate")
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # if nobody answers, nobody comes in
        if self._keys is not None:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.secret_key.encode())
        endpoint = f"inproc://guarded-{next(_names)}"
        socket.monitor(endpoint, WATCHED_EVENTS)
        self._monitor.connect(endpoint)

    def secure_output(self, push: "zmq.Socket[bytes]", output_key: str) -> None:
        """Encrypt what goes to a client's PULL, if links are encrypted. Only the client's PULL can
        read it, and only who knows its public key can reach it, which nobody but us was told.

        Raises:
            ValueError: it should be a key, and is none.
        """
        if self._keys is None:
            return
        if not is_key(output_key):
            raise ValueError("no key")
        push.set(zmq.CURVE_SERVERKEY, output_key.encode())
        push.set(zmq.CURVE_PUBLICKEY, self._keys.public_key.encode())
        push.set(zmq.CURVE_SECRETKEY, self._keys.secret_key.encode())

    def close(self) -> None:
        """Close the sockets; after the guarded one, whose handshakes ask them."""
        self._zap.close()
        self._monitor.close()

    # ---- who is there

    def receive(self, socket: "zmq.Socket[bytes]") -> tuple[Peer | None, bytes, list[bytes]]:
        """One message of a ROUTER: who sent it, its routing id, its frames. None is somebody whose
        key has been revoked since the connection was made.

        Raises:
            zmq.Again: there is none.
        """
        if self._is_ipc:
            client, *frames = socket.recv_multipart(zmq.NOBLOCK)
            return _LOCAL_PEER, client, frames
        # Each message carries what was found out about its connection.
        first = socket.recv(zmq.NOBLOCK, copy=False)
        frames = socket.recv_multipart(zmq.NOBLOCK) if first.more else []
        key = "" if self._keyring is None else str(first.get("User-Id"))
        proved = (key, str(first.get("Peer-Address")))
        if proved not in self._peers:
            if len(self._peers) > MAX_KNOWN_PEERS:
                self._peers.clear()
            self._peers[proved] = self._find_peer(*proved)
        return self._peers[proved], first.bytes, frames

    def refresh(self) -> bool:
        """Look for changed keys, if that is due; whether there are any."""
        now = time.monotonic()
        if self._keyring is None or now - self._refreshed_at < REFRESH_S:
            return False
        self._refreshed_at = now
        self._reload()
        has_changed, self._has_changed = self._has_changed, False
        return has_changed

    def still_lets_in(self, peer: Peer) -> bool:
        """Whether a peer that has been let in would be so now."""
        return self._keyring is None or self._keyring.find(peer.key) is not None

    def _reload(self) -> None:
        assert self._keyring is not None
        if self._keyring.refresh():
            self._peers.clear()
            self._has_changed = True

    def _find_peer(self, key: str, host: str) -> Peer | None:
        if self._keyring is None:
            return Peer(host=host)
        found = self._keyring.find(key)
        if found is None:
            return None
        name, guest = found
        return Peer(
            key=key,
            name=name,
            role=guest.role,
            host=host,
            is_insider=name == OWNER,
            max_requests=guest.max_requests,
            max_queued_tokens=guest.max_queued_tokens,
        )

    # ---- who comes

    def serve(self, ready: object) -> None:
        """Do what one of the `sockets` is ready for."""
        if ready is self._zap:
            self._answer(self._zap.recv_multipart())
        elif ready is self._monitor:
            event, descriptor = MONITOR_EVENT.unpack(self._monitor.recv_multipart()[0])
            is_new = self._rejections.on_event(event, descriptor)
            if is_new and self.num_rejected.bit_count() == 1:  # a flood fills no log
                logger.warning("connection number %d that was not let in", self.num_rejected)

    def _answer(self, question: list[bytes]) -> None:
        version, request_id, _, address, _, mechanism, *credentials = question
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        is_let_in = self._lets_in(address.decode(), mechanism, key)
        if not is_let_in:
            logger.info("not let in: %s %s", mechanism.decode(), key or "without a key")
        status, words = (b"200", b"OK") if is_let_in else (b"400", b"not let in")
        self._zap.send_multipart([version, request_id, status, words, key.encode(), b""])

    def _lets_in(self, address: str, mechanism: bytes, key: str) -> bool:
        if self._keyring is not None:
            self._reload()  # a key that was made or revoked just now counts at once
            return mechanism == b"CURVE" and self._keyring.find(key) is not None
        if mechanism != b"NULL":
            return False
        if not self._is_ipc:
            return is_loopback(address)
        # "localhost:uid:gid:pid", where the system tells; elsewhere there is the folder alone.
        _, *credentials = address.split(":")
        return not credentials or credentials[0] == str(os.getuid())
