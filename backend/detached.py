"""Requests with an id of their own: they outlive the connection that they came by."""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from footplate.backend.admission import RefusalError
from footplate.backend.request import Request
from footplate.protocol.codec import MAX_FRAME_BYTES
from footplate.protocol.messages import AddRequest, Finished, Started

# Stands in for the clients of requests that have none. Nobody else has this name: ZeroMQ leaves no
# client one that begins with a zero byte, and gives out such names itself with five bytes.
DETACHED = b"\0detached"
TOKEN_BYTES = 4  # of what is kept
# A request travels again, inside of a message that is a little larger than its own.
MAX_REQUEST_BYTES = MAX_FRAME_BYTES - 1024

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AddRequest).decode


@dataclass(slots=True, eq=False)
class Lease:
    """What is kept of one request.

    Attributes:
        frame: its message, encoded.
        arrival_time: on the core's clock, in seconds.
        request: None when it has ended.
        started: the report that goes with its first token, when there has been one.
        token_ids: of its output, when it has ended.
        end: likewise.
        told_to: client and handle that it was last told to when it had ended, if they are here.
    """

    session: bytes
    request_id: str
    frame: bytes
    arrival_time: float
    request: Request | None
    started: Started | None = None
    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    end: Finished | None = None
    told_to: tuple[bytes, int] | None = None
    num_counted_bytes: int = 0  # among those of its session

    def message(self, now: float) -> AddRequest:
        """As it was added, but as old as it is now."""
        return msgspec.structs.replace(_decode(self.frame), age_s=max(0.0, now - self.arrival_time))

    def output(self) -> list[int]:
        """All tokens, from position 0 on."""
        if self.request is not None:
            return self.request.token_ids[self.request.num_prompt_tokens :]
        return self.token_ids.tolist()

    def count_bytes(self) -> int:
        """Of all that is kept."""
        request = self.request
        num_tokens = len(self.token_ids) if request is None else request.num_output_tokens
        return len(self.frame) + TOKEN_BYTES * num_tokens


@dataclass(slots=True, eq=False)
class _Session:
    is_here: bool = False  # it has a connection
    leases: dict[str, Lease] = field(default_factory=dict)  # by request id
    num_bytes: int = 0  # of those that have ended, or run without a client


class Leases:
    """Owns what is kept of requests with an id, by session and id: of those that go on, of those
    that have ended within the lease time, and of those whose client has gone as long ago.

    One that ended while its client was there is kept as well: its last words may not have arrived.
    A session may keep so many bytes; beyond that the one that ended first is forgotten, and where
    none has ended, the first that runs without a client is ended.

    Args:
        lease_s: how long each is kept, in seconds.
        lease_bytes: how much a session may keep.
    """

    def __init__(self, lease_s: float, lease_bytes: int, clock: Callable[[], float]) -> None:
        self._clock = clock  # monotonic, seconds
        self._lease_s = lease_s
        self._lease_bytes = lease_bytes
        self._sessions: dict[bytes, _Session] = {}
        self._live: dict[tuple[bytes, int], Lease] = {}  # by client and handle
        self._told: dict[tuple[bytes, int], Lease] = {}  # likewise, of those that have ended
        # When each expires, the next one first: all are kept equally long.
        self._due: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._orphans: list[Request] = []
        self._gone: list[bytes] = []

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return bool(self._live or self._due)

    @property
    def num_detached(self) -> int:
        """Requests without a client: those that go on, and those that ended so."""
        away = (s for s in self._sessions.values() if not s.is_here)
        ended = sum(lease.request is None for s in away for lease in s.leases.values())
        return ended + sum(client == DETACHED for client, _ in self._live)

    # ---- sessions come and go

    def enter(self, session: bytes) -> None:
        """A session has a connection, its first or another. It has the lease time again, to attach
        to what there is."""
        known = self._sessions.setdefault(session, _Session())
        assert not known.is_here, "a session has one connection at a time"
        known.is_here = True
        for lease in known.leases.values():
            self._renew(lease)

    def leave(self, session: bytes) -> list[Lease]:
        """Its connection is gone, and it may come back.

        Returns:
            Those that go on, to be moved with `move`.
        """
        known = self._sessions[session]
        known.is_here = False
        for lease in known.leases.values():
            self._renew(lease)
            self._forget_told(lease)
        self._forget_if_gone(session)
        return [lease for lease in known.leases.values() if lease.request is not None]

    def end(self, session: bytes) -> None:
        """It has taken leave: nothing of it is kept."""
        known = self._sessions[session]
        known.is_here = False
        for lease in list(known.leases.values()):
            self.drop(lease)
        self._forget_if_gone(session)

    def take_gone(self) -> list[bytes]:
        """Sessions of which nothing is left, neither a connection nor a request."""
        gone, self._gone = self._gone, []
        return [session for session in gone if session not in self._sessions]

    def _forget_if_gone(self, session: bytes) -> None:
        known = self._sessions.get(session)
        if known is not None and not known.is_here and not known.leases:
            del self._sessions[session]
            self._gone.append(session)

    # ---- requests come, move and end

    def encode(self, message: AddRequest) -> bytes:
        """What is kept of a message.

        Raises:
            RefusalError: it is so large that it could not be sent back.
        """
        frame = _encode(message)
        if len(frame) > MAX_REQUEST_BYTES:
            raise RefusalError(
                f"the request has {len(frame)} bytes, with a request_id it must have at most "
                f"{MAX_REQUEST_BYTES}"
            )
        return frame

    def add(self, session: bytes, request_id: str, frame: bytes, request: Request) -> None:
        """A new request; the id is free."""
        leases = self._sessions[session].leases
        assert request_id not in leases
        lease = Lease(session, request_id, frame, request.arrival_time, request)
        leases[request_id] = self._live[request.client, request.handle] = lease

    def find(self, session: bytes, request_id: str) -> Lease | None:
        """What there is of this id."""
        known = self._sessions.get(session)
        return None if known is None else known.leases.get(request_id)

    def move(self, lease: Lease, client: bytes, handle: int) -> None:
        """Let a request that goes on be another client's, or nobody's (`DETACHED`)."""
        request = lease.request
        assert request is not None
        del self._live[request.client, request.handle]
        request.client, request.handle = client, handle
        self._live[client, handle] = lease
        if client != DETACHED:
            self._due.pop((lease.session, lease.request_id), None)
        self._count(lease)
        self._keep_within_bounds(lease.session)

    def abandon(self, client: bytes, handle: int) -> None:
        """A client wants no more of a request, if it is one of these. It may have ended, when the
        client had not heard of it yet."""
        place = client, handle
        if lease := self._live.get(place) or self._told.get(place):
            self.drop(lease)

    def drop(self, lease: Lease) -> None:
        """Forget one. If its request goes on, it is like any other from now on, or an orphan."""
        known = self._sessions[lease.session]
        del known.leases[lease.request_id]
        known.num_bytes -= lease.num_counted_bytes
        self._due.pop((lease.session, lease.request_id), None)
        self._forget_told(lease)
        if lease.request is not None:
            del self._live[lease.request.client, lease.request.handle]
            if lease.request.client == DETACHED:
                self._orphans.append(lease.request)
        self._forget_if_gone(lease.session)

    def on_start(self, client: bytes, started: Started) -> None:
        """A request has its first token."""
        if lease := self._live.get((client, started.handle)):
            lease.started = started

    def on_end(self, client: bytes, finished: Finished) -> None:
        """A request has ended: keep it, if it is one of these."""
        lease = self._live.pop((client, finished.handle), None)
        if lease is None:
            return
        lease.token_ids = array("I", lease.output())
        lease.request = None
        lease.end = finished
        known = self._sessions[lease.session]
        known.leases[lease.request_id] = known.leases.pop(lease.request_id)  # in order of ends
        if known.is_here:
            self._renew(lease)
        if client != DETACHED:
            self._tell(lease, client, finished.handle)
        self._count(lease)
        self._keep_within_bounds(lease.session)

    def on_answer(self, lease: Lease, client: bytes, handle: int) -> None:
        """Somebody was told of one that has ended, which may not arrive either."""
        self._renew(lease)
        self._tell(lease, client, handle)

    def _tell(self, lease: Lease, client: bytes, handle: int) -> None:
        self._forget_told(lease)
        lease.told_to = client, handle
        self._told[lease.told_to] = lease

    def _forget_told(self, lease: Lease) -> None:
        place, lease.told_to = lease.told_to, None
        # A client may have used a handle twice, though it must not.
        if place is not None and self._told.get(place) is lease:
            del self._told[place]

    def count_tokens(self, handles: Iterable[int]) -> None:
        """Requests without a client have new tokens."""
        for handle in handles:
            if lease := self._live.get((DETACHED, handle)):
                self._count(lease)
                self._keep_within_bounds(lease.session)

    # ---- bounds

    @property
    def next_due(self) -> float | None:
        """When the next one expires, on the core's clock."""
        return next(iter(self._due.values()), None)

    def expire(self, now: float) -> None:
        """Forget what has been kept for long enough."""
        while self._due:
            (session, request_id), due = next(iter(self._due.items()))
            if due > now:
                return
            self.drop(self._sessions[session].leases[request_id])

    def take_orphans(self) -> list[Request]:
        """Requests that had no client and are kept no longer, to be ended if they have not."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def _renew(self, lease: Lease) -> None:
        key = (lease.session, lease.request_id)
        self._due[key] = self._clock() + self._lease_s
        self._due.move_to_end(key)

    def _count(self, lease: Lease) -> None:
        is_kept = lease.request is None or lease.request.client == DETACHED
        num_bytes = lease.count_bytes() if is_kept else 0
        self._sessions[lease.session].num_bytes += num_bytes - lease.num_counted_bytes
        lease.num_counted_bytes = num_bytes

    def _keep_within_bounds(self, session: bytes) -> None:
        known = self._sessions[session]
        while known.num_bytes > self._lease_bytes:
            kept = [lease for lease in known.leases.values() if lease.num_counted_bytes]
            # The first that has ended, or the first at all.
            victim = next((lease for lease in kept if lease.request is None), kept[0])
            self.drop(victim)

    def check_ledger(self, live: Iterable[Request]) -> None:
        """Assert what must hold between two calls, given all requests that go on. For tests."""
        for request in live:
            is_kept = (request.client, request.handle) in self._live
            assert is_kept or request.client != DETACHED or request in self._orphans
        leases = [lease for s in self._sessions.values() for lease in s.leases.values()]
        going_on = {(r.client, r.handle): r for r in live}
        for place, lease in self._live.items():
            assert lease.request is going_on[place]
        assert sum(lease.request is not None for lease in leases) == len(self._live)
        for session, known in self._sessions.items():
            assert known.is_here or known.leases
            assert known.num_bytes == sum(x.num_counted_bytes for x in known.leases.values())
            for request_id, lease in known.leases.items():
                is_attached = lease.request is not None and lease.request.client != DETACHED
                assert is_attached == ((session, request_id) not in self._due)
                assert is_attached == (lease.num_counted_bytes == 0)
        assert list(self._due.values()) == sorted(self._due.values())
        for place, lease in self._told.items():
            assert lease.told_to == place and lease.request is None and lease in leases
            assert self._sessions[lease.session].is_here
