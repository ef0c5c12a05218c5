"""Who takes part in the step that is running, written down where it outlives this process.

A core that ends within a step can tell nobody whose request it was that ended it. The next one at
its address reads this record, and tells every client which of its own requests were there.
"""

import logging
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

from footplate.backend import fail_points
from footplate.backend.request import Request
from footplate.backend.step import ModelRunner, StepPlan, StepResult

logger = logging.getLogger(__name__)

# The file: magic, CRC-32 of the entries, their number; then the entries, and anything behind them.
# An entry: a digest of the client's session (the name itself would let whoever reads it take over
# the client's requests), and the client's handle.
MAGIC = b"footstep"
_HEADER = struct.Struct("<8sII")
_ENTRY = struct.Struct("<8sq")
_NOBODY = bytes(8)  # in the place of a digest: a client without a session cannot be told
MAX_FILE_BYTES = 2**24

Suspects = Mapping[bytes, list[int]]  # handles by digest of their session, or of nobody


def digest_session(session: bytes) -> bytes:
    """What stands for a session in the file."""
    return blake2b(session, digest_size=8).digest()


class FlightRecorder:
    """Owns the file, which is written when others take part than in the step before. That is a copy
    into memory that the system keeps whatever becomes of this process; nothing waits for a disk.

    What another core has left there stays until the first step: should this one end before, the
    next can still read it.

    Args:
        path: None records nothing.
        max_entries: most requests in a step.
    """

    def __init__(self, path: Path | None, max_entries: int) -> None:
        size = _HEADER.size + max_entries * _ENTRY.size
        self._memory = None if path is None else _open(path, size)
        self._digests: dict[bytes, bytes] = {}  # of sessions, by client
        self._noted: list[Request] = []
        self._is_written = False

    @property
    def is_clear(self) -> bool:
        """Whether nobody is on record, of this core's steps or of the last one's before it."""
        if self._memory is None:
            return True
        magic, _, count = _HEADER.unpack_from(self._memory)
        return magic != MAGIC or not count

    def join(self, client: bytes, session: bytes) -> None:
        """A client whose requests are to be told to this session."""
        if session:
            self._digests[client] = digest_session(session)
        self.renew()

    def leave(self, client: bytes) -> None:
        """It is gone. Unknown clients are no error."""
        self._digests.pop(client, None)
        self.renew()

    def renew(self) -> None:
        """Requests may have another client or handle than before, and their `record` is empty."""
        self._noted = []

    def note(self, requests: list[Request]) -> None:
        """These take part in the step that begins now. The list must not be changed later."""
        if requests == self._noted:  # of the same objects: a fifth of a microsecond for 256
            return
        self._noted = requests
        if self._memory is None:
            return
        # Requests carry their entries: to look them up would cost as much as all the rest.
        content = b"".join([request.record for request in requests])
        if len(content) < len(requests) * _ENTRY.size:
            content = self._encode(requests)
        header = _HEADER.pack(MAGIC, crc32(content), len(requests))
        self._memory[: len(header) + len(content)] = header + content
        self._is_written = True

    def _encode(self, requests: list[Request]) -> bytes:
        for request in requests:
            if not request.record:
                digest = self._digests.get(request.client, _NOBODY)
                request.record = _ENTRY.pack(digest, request.handle)
        return b"".join([request.record for request in requests])

    def clear(self) -> None:
        """No step is running, and none is about to."""
        if self._is_written and self._memory is not None:
            self._memory[: _HEADER.size] = _HEADER.pack(MAGIC, 0, 0)
            self._is_written = False
            self.renew()


def _open(path: Path, size: int) -> mmap.mmap | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            _check_file(file)
            # Where there is no room for it, writing to the mapping would end this process.
            os.posix_fallocate(file, 0, size)
            return mmap.mmap(file, size)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        logger.warning("steps are not recorded: %s", error)
        return None


class RecordedRunner:
    """A `ModelRunner` that notes who takes part before it runs a plan."""

    def __init__(self, runner: ModelRunner, recorder: FlightRecorder) -> None:
        self.facts = runner.facts
        self._runner = runner
        self._recorder = recorder

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        if plan.requests:
            self._recorder.note(plan.requests)
            if fail_points.ENABLED:
                fail_points.reach("runner.execute", plan.requests)
        return self._runner.execute(plan)


def read_suspects(path: Path | None) -> Suspects:
    """Who took part in the step in which the core before this one ended. Nobody, when there is no
    such file, or it makes no sense."""
    if path is None:
        return {}
    try:
        # A pipe in its place must not keep us waiting.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    with suppress(OSError, ValueError, struct.error), os.fdopen(file, "rb") as record:
        _check_file(file)
        return _parse(record.read(MAX_FILE_BYTES))
    return {}


def _check_file(file: int) -> None:
    """Raise ValueError for what this user's cores have not made."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError("there is something else in the place of their record")


def _parse(content: bytes) -> Suspects:
    magic, checksum, count = _HEADER.unpack_from(content)
    entries = content[_HEADER.size : _HEADER.size + count * _ENTRY.size]
    if magic != MAGIC or len(entries) != count * _ENTRY.size or crc32(entries) != checksum:
        return {}
    suspects: dict[bytes, list[int]] = {}
    for digest, handle in _ENTRY.iter_unpack(entries):
        suspects.setdefault(digest, []).append(handle)
    return suspects


def suspects_of(session: bytes, suspects: Suspects) -> list[int]:
    """The handles that are a session's own."""
    return list(suspects.get(digest_session(session), ())) if session and suspects else []
