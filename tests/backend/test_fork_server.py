"""The fork server where it cannot fork; what it does otherwise is tested with real processes."""

import os
import signal
import socket

import pytest

from footplate.backend.fork_server import EX_OSERR, ForkServer
from footplate.protocol.fork_link import Ended, Fork, ForkLink


def test_a_process_that_the_system_refuses_has_ended_and_its_files_are_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    one, other = socket.socketpair()
    with one, other:
        client = ForkLink(one)
        reading, writing = os.pipe()
        for number in (1, 2):
            client.send(Fork(number, {}, 0.0), [writing])
        os.close(writing)
        one.shutdown(socket.SHUT_WR)
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            with pytest.raises(EOFError):
                ForkServer(ForkLink(other)).serve()
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, handler)
        assert client.receive() == (Ended(1, EX_OSERR), [])
        assert client.receive() == (Ended(2, EX_OSERR), [])
    assert os.read(reading, 1) == b""  # nobody has the other end any more
    os.close(reading)
    assert "no more processes" in caplog.text
