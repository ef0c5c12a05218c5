"""A core on tcp that lets in whoever has a key, and peers of all kinds."""

import queue
import shlex
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.link_keys import new_key_pair
from footplate.protocol.errors import EngineStartError
from footplate.protocol.keys import (
    Guest,
    make_client_key,
    make_server_key,
    read_client_keys,
    revoke,
)

from .conftest import HERE, PATIENCE_S
from .raw_client import CurveClient


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class GuardedCore:
    """A core process with keys."""

    address: str
    folder: Path
    key_dir: Path
    process: CoreProcess
    ends: "queue.Queue[EngineStartError]"

    def make_key(self, name: str, **guest: Any) -> str:
        """Let a client in; the path of its key file."""
        pair, key_file = new_key_pair(), self.folder / f"{name}.key"
        guest_of_name = Guest(public_key=pair.public_key, **guest)
        make_client_key(self.key_dir, name, pair, key_file, guest_of_name)
        return str(key_file)

    def revoke(self, name: str) -> None:
        revoke(self.key_dir, name)

    def connect(self, key_file: str, **arguments: Any) -> AsyncLLMEngine:
        return AsyncLLMEngine.connect(self.address, key_file=key_file, **arguments)


@contextmanager
def guarded_core(
    host: str = "127.0.0.1", mode: str | None = None, **engine_args: Any
) -> Iterator[GuardedCore]:
    """Args:
    mode: the core obeys (see `obedient_core`).
    """
    with tempfile.TemporaryDirectory(prefix="fp-", dir="/tmp") as name:
        folder = Path(name)
        key_dir = folder / "keys"
        make_server_key(key_dir, new_key_pair())
        address = f"tcp://{host}:{free_port()}"
        args = EngineArgs(model="fake", key_dir=str(key_dir), **engine_args)
        ends: queue.Queue[EngineStartError] = queue.Queue()
        with pytest.MonkeyPatch.context() as patch:
            if mode is not None:
                command = [sys.executable, str(HERE / "obedient_core.py"), mode, "/dev/null"]
                program = folder / "program"
                program.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
                program.chmod(0o700)
                patch.setattr(sys, "executable", str(program))
            process = CoreProcess(args.core_config(address), ends.put)
        try:
            yield GuardedCore(address, folder, key_dir, process, ends)
        finally:
            process.stop()


@contextmanager
def curve_client(
    address: str, key_file: str, client_id: bytes | None = None
) -> Iterator[CurveClient]:
    client = CurveClient(address, read_client_keys(Path(key_file)), client_id)
    try:
        yield client
    finally:
        client.close()


class Proxy:
    """Forwards one connection after the other to an address, and passes what clients send through
    a function on the way. Keeps the bytes as they came."""

    def __init__(self, address: str, alter: Callable[[bytes, int], bytes]) -> None:
        """Args:
        alter: given a chunk that a client sent and how many bytes came before it.
        """
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._alter = alter
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.recorded = b""
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._run)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        try:
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self._start(self._forward, near, far, True)
                self._start(self._forward, far, near, False)
        except OSError:
            return  # closed

    def _forward(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        num_bytes = 0
        try:
            while chunk := source.recv(65536):
                if is_client:
                    self.recorded += chunk
                    altered = self._alter(chunk, num_bytes)
                    num_bytes += len(chunk)
                    chunk = altered
                target.sendall(chunk)
        except OSError:
            pass
        finally:
            for end in (source, target):
                _shut(end)

    def close(self) -> None:
        for end in (self._listener, *self._sockets):
            _shut(end)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for end in (self._listener, *self._sockets):
            end.close()


def _shut(end: socket.socket) -> None:
    """Wake whoever waits on it, here and there, which closing does not."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(address: str, alter: Callable[[bytes, int], bytes] | None = None) -> Iterator[Proxy]:
    forwarding = Proxy(address, alter or (lambda chunk, _: chunk))
    try:
        yield forwarding
    finally:
        forwarding.close()
