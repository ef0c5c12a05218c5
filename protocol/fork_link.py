"""What an engine's client and its fork server tell each other, over a pair of sockets.

A message is its length (four bytes, little endian) and msgpack; file descriptors travel with the
length.
"""

import array
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from footplate.protocol.config import CoreConfig
from footplate.protocol.pipes import read_exactly

# Of a child: its standard input and output, then memory for packed weights, if cores share it.
MAX_FILES = 3
# Begins the names of this project's own environment variables.
OWN_VARIABLES = "FOOTPLATE_"
_HEADER = struct.Struct("<I")


class Prepare(msgspec.Struct, tag="prepare", array_like=True, frozen=True):
    """The first message: what the cores will be like, so that it can be imported what they need."""

    config: CoreConfig


class Fork(msgspec.Struct, tag="fork", array_like=True, frozen=True):
    """Make a process; with descriptors (see `MAX_FILES`).

    Attributes:
        number: chosen by the client, for the answers.
        environment: all `OWN_VARIABLES`, as they are now.
        asked_at: seconds of the monotonic clock, which all processes have in common.
    """

    number: int
    environment: dict[str, str]
    asked_at: float


class Forked(msgspec.Struct, tag="forked", array_like=True, frozen=True):
    """It is there; with a descriptor of the process itself (a pidfd) where the system has that."""

    number: int
    process_id: int


class Ended(msgspec.Struct, tag="ended", array_like=True, frozen=True):
    """It is no more; the status is negative after a signal."""

    number: int
    status: int


Request = Prepare | Fork
Answer = Forked | Ended


class ForkLink:
    """One end of the pair of sockets. One thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Request | Answer).decode

    def fileno(self) -> int:
        """For `poll`."""
        return self._end.fileno()

    def send(self, message: Request | Answer, files: Sequence[int] = ()) -> None:
        """Raises:
        OSError: the other end is gone.
        """
        body = self._encode(message)
        header = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
        frame = _HEADER.pack(len(body)) + body
        sent = self._end.sendmsg([frame], header)
        self._end.sendall(frame[sent:])

    def receive(self) -> tuple[Request | Answer, list[int]]:
        """The next message, and the descriptors that came with it, which no program inherits.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            header, files = self._receive_header()
            (size,) = _HEADER.unpack(header)
            return self._decode(read_exactly(self._end.fileno(), size)), files
        except ConnectionError:
            raise EOFError from None

    def _receive_header(self) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(MAX_FILES * array.array("i").itemsize)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        header, ancillary, _, _ = self._end.recvmsg(_HEADER.size, space, flags)
        files = array.array("i")
        for _, _, data in ancillary:
            files.frombytes(data)
        rest = read_exactly(self._end.fileno(), _HEADER.size - len(header))
        return header + rest, files.tolist()

    def close(self) -> None:
        """Let the other end see an end."""
        # Not only closed: another thread may be waiting in it.
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
