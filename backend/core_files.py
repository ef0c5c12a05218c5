"""What an engine core leaves in the file system, so that it leaves nothing: the socket, the lock
and the record of its steps beside it, the sockets of its clients, the folder that was made for it.
"""

import fcntl
import glob
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import AddressInUseError
from footplate.protocol.links import ipc_path, make_owned_dir


class CoreFiles:
    """Owns what the core leaves in the file system, so that it leaves nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._socket = ipc_path(config.address)
        self._private_dir = config.private_dir
        self._keeps_steps = False
        self._lock: int | None = None
        self._is_removed = False
        # The death line may end while the main thread makes files, and both may remove them.
        self._mutex = threading.Lock()

    @property
    def steps(self) -> Path | None:
        """Where the record of steps is; None where there is no folder for it."""
        if self._socket is not None:
            return self._socket.with_name(f"{self._socket.name}.steps")
        return None if self._private_dir is None else Path(self._private_dir) / "engine.steps"

    def keep_steps(self) -> None:
        """The core has failed: the next one at its address is to read who took part."""
        self._keeps_steps = True

    @contextmanager
    def claim_address(self) -> Iterator[None]:
        """Take the exclusive right to the ipc path; bind it in the body. Binding alone would not
        do: it silently steals the path from a live core.

        Raises:
            AddressInUseError: a live process has it, or something that is no socket is there.
        """
        with self._mutex:
            if self._is_removed:
                sys.exit(0)
            if self._socket is not None:  # binding a TCP port is exclusive by itself
                self._claim(self._socket)
            yield

    def _claim(self, path: Path) -> None:
        make_owned_dir(path.parent)
        self._lock = _lock_exclusively(_lock_path(path))
        if _is_in_the_way(path):
            raise AddressInUseError(f"{path} exists and is not a socket: remove it")
        # What a core and clients left behind that were killed together. A client may also be
        # early, and wait for this very core.
        _remove_dead_sockets_beside(path)

    def remove(self) -> None:
        """Remove socket and lock, once: when the lock is gone, another core may be using the same
        names. The folder stays, for a core that takes this one's place."""
        with self._mutex:
            self._remove()

    def remove_all(self) -> None:
        """The parent is gone, so no other core will come: the private folder goes as well."""
        # Under one lock: a main thread that finds its address removed ends the process.
        with self._mutex:
            self._remove()
            if self._private_dir is not None:
                shutil.rmtree(self._private_dir, ignore_errors=True)

    def _remove(self) -> None:
        if self._is_removed:
            return
        self._is_removed = True
        owns_address = self._socket is None or self._lock is not None
        if owns_address and self.steps is not None and not self._keeps_steps:
            self.steps.unlink(missing_ok=True)
        if self._socket is not None and self._lock is not None:
            _remove_dead_sockets_beside(self._socket)
            if not _is_in_the_way(self._socket):
                self._socket.unlink(missing_ok=True)
            _lock_path(self._socket).unlink(missing_ok=True)


def _is_in_the_way(path: Path) -> bool:
    """Whether something is there that no core has made."""
    return path.is_symlink() or (path.exists() and not path.is_socket())


def _remove_dead_sockets_beside(address: Path) -> None:
    for path in address.parent.glob(f"{glob.escape(address.name)}.*"):
        if path.is_socket() and not _has_listener(path):
            path.unlink(missing_ok=True)


def _has_listener(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.1)
        return probe.connect_ex(str(path)) == 0


def _lock_path(socket_path: Path) -> Path:
    return socket_path.with_name(socket_path.name + ".lock")


def _lock_exclusively(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise AddressInUseError(
                f"another engine core (process {holder}) holds {path.with_suffix('')}: stop it, "
                "or choose another address"
            ) from None
        # The holder before us may have removed the file between our open and our lock; a lock
        # on a file without a name excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                return lock
        os.close(lock)
