"""Messages and descriptors between a client and its fork server."""

import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from footplate.protocol.config import CoreConfig
from footplate.protocol.fork_link import Ended, Fork, Forked, ForkLink, Prepare

Ends = tuple[ForkLink, socket.socket, ForkLink]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A link, the socket below it, and the other end."""
    one, other = socket.socketpair()
    links = ForkLink(one), one, ForkLink(other)
    yield links
    links[0].close()
    links[2].close()


@pytest.mark.parametrize(
    "message",
    [
        Prepare(CoreConfig(address="ipc:///x/y", private_dir="/x")),
        Fork(1, {"FOOTPLATE_X": "a" * 100_000}, 0.5),
        Forked(2**40, 17),
        Ended(3, -9),
    ],
)
def test_every_message_comes_as_it_was_sent(ends: Ends, message: Prepare) -> None:
    ends[0].send(message)
    ends[0].send(Ended(0, 0))
    assert ends[2].receive() == (message, [])
    assert ends[2].receive() == (Ended(0, 0), [])


def test_descriptors_come_with_their_message_and_no_program_inherits_them(ends: Ends) -> None:
    reading, writing = os.pipe()
    ends[0].send(Fork(1, {}, 0.0), [reading, writing])
    ends[0].send(Fork(2, {}, 0.0))
    os.close(reading)
    os.close(writing)
    request, files = ends[2].receive()
    assert request == Fork(1, {}, 0.0)
    assert len(files) == 2
    assert not any(map(os.get_inheritable, files))
    os.write(files[1], b"hello")
    assert os.read(files[0], 5) == b"hello"
    for file in files:
        os.close(file)
    assert ends[2].receive() == (Fork(2, {}, 0.0), [])


@pytest.mark.parametrize("sent", [b"", b"\x05", struct.pack("<I", 5), struct.pack("<I", 5) + b"ab"])
def test_an_end_anywhere_is_an_end(ends: Ends, sent: bytes) -> None:
    ends[1].sendall(sent)
    ends[0].close()
    with pytest.raises(EOFError):
        ends[2].receive()
    with pytest.raises(OSError):
        ends[2].send(Ended(1, 0))


def test_what_is_no_message_is_an_error(ends: Ends) -> None:
    ends[1].sendall(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    with pytest.raises(msgspec.MsgspecError):
        ends[2].receive()
