"""Who is next: first come, first served within a client, and a fair share between clients.

A client is whoever has a share of the service: a connection, or a session that outlives its own.

The Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI '24,
algorithm 2): the client that has been served the fewest tokens goes first. Who comes back from
idleness is lifted to the least served of those that wait: a share is not saved up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from footplate.backend.request import Request, State

Rank = tuple[int, float, int]


@dataclass(slots=True)
class _Line:
    """One client's requests, and what it has been served: tokens, prompt and output alike."""

    num_served: int = 0
    num_waiting: int = 0
    # Requests that wait no longer stay until they surface, are too many, or wait again.
    heap: list[tuple[Rank, Request]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)  # their keys


class WaitingQueue:
    """Owns the order of requests that hold no blocks, and the count of tokens per client.

    With one client it is exactly its requests in their order. Under the priority policy a better
    priority goes first, whoever's it is, and shares are fair among equal ones.
    """

    def __init__(self, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._lines: dict[bytes, _Line] = {}
        self._num_waiting = 0
        self._last = _Line()  # of the client that was the last to stop waiting

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All that wait, in no particular order."""
        for line in self._lines.values():
            for _, request in line.heap:
                if request.key not in line.gone:
                    yield request

    @property
    def is_shared(self) -> bool:
        """Whether there is more than one client, so that service has to be counted."""
        return len(self._lines) > 1

    def rank(self, request: Request) -> Rank:
        """A request's place among those of its client, and among those that run."""
        priority = request.priority if self._by_priority else 0
        return (priority, request.arrival_time, request.arrival)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        line = self._lines.get(request.share)
        if line is None:
            line = self._lines[request.share] = _Line()
        if not line.num_waiting:
            self._lift(line)
        if request.key in line.gone:
            line.gone.remove(request.key)  # it is still in its place, which is for life
        else:
            heappush(line.heap, (self.rank(request), request))
        line.num_waiting += 1
        self._num_waiting += 1

    def _lift(self, line: _Line) -> None:
        waiting = [other.num_served for other in self._lines.values() if other.num_waiting]
        line.num_served = max(line.num_served, min(waiting, default=self._last.num_served))

    def peek(self) -> Request | None:
        """Who is next."""
        if not self._num_waiting:
            return None
        if len(self._lines) == 1:
            [line] = self._lines.values()
            return _first(line)
        return min(filter(None, map(_first, self._lines.values())), key=self._key)

    def _key(self, request: Request) -> tuple[int, int, Rank]:
        rank = self.rank(request)
        return (rank[0], self._lines[request.share].num_served, rank)

    def pop(self) -> Request:
        """Take out who is next."""
        request = self.peek()
        assert request is not None
        line = self._lines[request.share]
        heappop(line.heap)
        self._leave(line)
        return request

    def discard(self, request: Request) -> None:
        """A request that waited does so no longer: it has finished, or is parked."""
        line = self._lines[request.share]
        self._leave(line)
        line.gone.add(request.key)
        if len(line.gone) > line.num_waiting + 64:
            line.heap = [entry for entry in line.heap if entry[1].key not in line.gone]
            line.gone.clear()
            heapify(line.heap)

    def _leave(self, line: _Line) -> None:
        line.num_waiting -= 1
        self._num_waiting -= 1
        if not line.num_waiting:
            self._last = line

    def serve(self, client: bytes, num_tokens: int) -> None:
        """Count what a client that has waited is given."""
        self._lines[client].num_served += num_tokens

    def forget(self, client: bytes) -> None:
        """A client has left, and none of its requests waits. Unknown ones are no error."""
        line = self._lines.pop(client, None)
        assert line is None or not line.num_waiting

    def check_ledger(self) -> None:
        """Assert what must hold between two calls. For tests."""
        assert self._num_waiting == sum(1 for _ in self)
        for client, line in self._lines.items():
            live = [r for _, r in line.heap if r.key not in line.gone]
            assert line.num_waiting == len(live) == len(line.heap) - len(line.gone)
            assert {r.state for r in live} <= {State.WAITING, State.PREEMPTED}
            assert {r.share for r in live} <= {client}
            for index, entry in enumerate(line.heap[1:], 1):
                assert line.heap[(index - 1) // 2][0] < entry[0], "a line is no heap"


def _first(line: _Line) -> Request | None:
    """Who is next of one client. Who waits no longer and has surfaced is dropped."""
    while line.heap:
        request = line.heap[0][1]
        if request.key not in line.gone:
            return request
        heappop(line.heap)
        line.gone.remove(request.key)
    return None
