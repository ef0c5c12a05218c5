"""The keys that are let in, as their files are now."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from footplate.protocol.keys import Guest, guest_dir, guest_files, read_guests

logger = logging.getLogger(__name__)

OWNER = "the engine's owner"
_Signature = list[tuple[str, int, int, int]]


class Keyring:
    """Owns what the core knows of its clients' keys. A file that is gone, or is no longer right,
    lets nobody in."""

    def __init__(self, key_dir: Path, owner_key: str = "") -> None:
        """Args:
        owner_key: is let in as an admin, without a file.

        Raises:
            KeyFileError: a file is not right; an operator who is there should know.
        """
        self._key_dir = key_dir
        self._owner_key = owner_key
        self._signature = self._sign()
        self._guests, errors = read_guests(key_dir)
        if errors:
            raise errors[0]

    def find(self, public_key: str) -> tuple[str, Guest] | None:
        """Name and guest of a key; None if it opens nothing."""
        if public_key and public_key == self._owner_key:
            return OWNER, Guest(public_key=public_key, role="admin")
        return self._guests.get(public_key)

    def refresh(self) -> bool:
        """Look at the files again; whether anything has changed."""
        signature = self._sign()
        if signature == self._signature:
            return False
        self._signature = signature
        self._guests, errors = read_guests(self._key_dir)
        for error in errors:
            logger.error("a client is not let in: %s", error)
        logger.info("the keys have changed: %d clients are let in", len(self._guests))
        return True

    def _sign(self) -> _Signature:
        signature = []
        for path in (guest_dir(self._key_dir), *guest_files(self._key_dir)):
            with suppress(OSError):  # it went meanwhile
                status = os.lstat(path)
                times = status.st_mtime_ns, status.st_ctime_ns
                signature.append((path.name, status.st_ino, *times))
        return signature
