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

# The file: magic, then slots. A slot: a digest of the client's session (the name itself would let
# whoever reads it take over the client's requests), the client's handle, and the CRC-32 of both.
# Whatever makes no sense, an empty slot or one that was only half written, says nothing.
MAGIC = b"footstep"
_ENTRY = struct.Struct("<8sq")
_CHECKSUM = struct.Struct("<I")
SLOT_BYTES = _ENTRY.size + _CHECKSUM.size
_EMPTY = bytes(SLOT_BYTES)
_NOBODY = bytes(8)  # in the place of a digest: a client without a session cannot be told
MAX_FILE_BYTES = 2**24

Suspects = Mapping[bytes, list[int]]  # handles by digest of their session, or of nobody


def digest_session(session: bytes) -> bytes:
    """What stands for a session in the file."""
    return blake2b(session, digest_size=8).digest()


class FlightRecorder:
    """Owns the file. Between two steps a few requests go and a few come, so each has a slot, and
    nothing else is written. That is a copy into memory that the system keeps whatever becomes of
    this process; nothing waits for a disk.

    What another core has left there stays until the first step: should this one end before, the
    next can still read it.

    Args:
        path: None records nothing.
        num_slots: most requests in a step.
    """

    def __init__(self, path: Path | None, num_slots: int) -> None:
        self._num_slots = num_slots
        size = len(MAGIC) + num_slots * SLOT_BYTES
        self._memory = None if path is None else _open(path, size)
        self._digests: dict[bytes, bytes] = {}  # of sessions, by client
        self._slots: dict[int, int] = {}  # by request key: where its entry begins
        self._free: list[int] = []
        self._is_stale = True  # there are entries of somebody else, or of before

    @property
    def is_clear(self) -> bool:
        """Whether nobody is on record, of this core's steps or of the last one's before it."""
        return self._memory is None or not any(self._memory[len(MAGIC) :])

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
        """Requests may have another client or handle than before."""
        self._is_stale = True

    def note(self, plan: StepPlan) -> None:
        """The requests of this plan take part in the step that begins now."""
        slots = self._slots
        if self._memory is None or not (plan.requests or slots):
            return
        for key in plan.released:
            if (slot := slots.pop(key, None)) is not None:
                self._memory[slot : slot + SLOT_BYTES] = _EMPTY
                self._free.append(slot)
        if plan.admitted is None or self._is_stale:
            self._rewrite(plan.requests)
            return
        for request in plan.admitted:
            if request.key not in slots and self._free:
                slot = slots[request.key] = self._free.pop()
                self._memory[slot : slot + SLOT_BYTES] = self._encode(request)
        if len(slots) != len(plan.requests):  # some pause, or did and go on
            self._rewrite(plan.requests)

    def _rewrite(self, requests: list[Request]) -> None:
        assert self._memory is not None and len(requests) <= self._num_slots
        places = range(len(MAGIC), len(self._memory), SLOT_BYTES)
        self._slots = {r.key: place for r, place in zip(requests, places, strict=False)}
        self._free = list(places[len(requests) :])
        entries = b"".join(map(self._encode, requests))
        self._memory[:] = (MAGIC + entries).ljust(len(self._memory), b"\0")
        self._is_stale = False

    def _encode(self, request: Request) -> bytes:
        entry = _ENTRY.pack(self._digests.get(request.client, _NOBODY), request.handle)
        return entry + _CHECKSUM.pack(crc32(entry))

    def clear(self) -> None:
        """No step is running, and none is about to."""
        if self._slots:
            self._rewrite([])


def _open(path: Path, size: int) -> mmap.mmap | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            _check_file(file)
            # Where there is no room for it, writing to the mapping would end this process.
            os.posix_fallocate(file, 0, size)
            # All of it: one that was made for more requests has more slots to clear.
            return mmap.mmap(file, min(os.fstat(file).st_size, MAX_FILE_BYTES))
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
        self._recorder.note(plan)
        if fail_points.ENABLED and plan.requests:
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
    with suppress(OSError, ValueError), os.fdopen(file, "rb") as record:
        _check_file(file)
        return _parse(record.read(MAX_FILE_BYTES))
    return {}


def _check_file(file: int) -> None:
    """Raise ValueError for what this user's cores have not made."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError("there is something else in the place of their record")


def _parse(content: bytes) -> Suspects:
    suspects: dict[bytes, list[int]] = {}
    if not content.startswith(MAGIC):
        return suspects
    for start in range(len(MAGIC), len(content) - SLOT_BYTES + 1, SLOT_BYTES):
        entry = content[start : start + _ENTRY.size]
        (checksum,) = _CHECKSUM.unpack_from(content, start + _ENTRY.size)
        digest, handle = _ENTRY.unpack(entry)
        if crc32(entry) == checksum:
            suspects.setdefault(digest, []).append(handle)
    return suspects


def suspects_of(session: bytes, suspects: Suspects) -> list[int]:
    """The handles that are a session's own, ascending."""
    return sorted(suspects.get(digest_session(session), ())) if session and suspects else []
