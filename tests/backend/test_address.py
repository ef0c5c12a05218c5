"""Who is asked before anything slow is done: whether an address is taken."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from footplate.backend.address import is_free, name_listener


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_path_is_free_until_somebody_holds_its_lock(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine.sock"
    assert is_free(address)
    lock = os.open(tmp_path / "engine.sock.lock", os.O_RDWR | os.O_CREAT)
    os.write(lock, b"1")  # there is such a process, but it does not hold the lock
    assert is_free(address)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert not is_free(address)
    os.close(lock)
    assert is_free(address)


def test_a_port_is_free_until_somebody_listens_on_it(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert not is_free(f"tcp://127.0.0.1:{port}")
    assert not is_free(f"tcp://*:{port}")
    assert name_listener(f"tcp://127.0.0.1:{port}") == f" (process {os.getpid()} does)"
    listener.close()
    assert is_free(f"tcp://127.0.0.1:{port}")
    assert is_free(f"tcp://*:{port}")
    assert name_listener(f"tcp://127.0.0.1:{port}") == ""


def test_who_asks_leaves_no_trace(tmp_path: Path) -> None:
    assert is_free(f"ipc://{tmp_path}/engine.sock")
    assert list(tmp_path.iterdir()) == []
