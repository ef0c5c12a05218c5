"""The requests that have not ended, and the one way for them to end."""

from collections.abc import Iterable, Iterator

from footplate.backend.delivery import Delivery
from footplate.backend.request import Request
from footplate.backend.scheduler import Scheduler
from footplate.protocol.messages import ErrorKind, FinishReason


class LiveRequests:
    """Owns which requests go on, by client and handle. Whose a request is says the request itself;
    a client has a table here from when it joins until it leaves.

    A request that ends is out of the table, out of the scheduler, and told to its client: all at
    once, so that no handle gets two ends, and none gets none.
    """

    def __init__(self, scheduler: Scheduler, delivery: Delivery) -> None:
        self._scheduler = scheduler
        self._delivery = delivery
        self._tables: dict[bytes, dict[int, Request]] = {}

    def join(self, client: bytes) -> None:
        """A client that may have requests from now on."""
        assert client not in self._tables, "its requests would be out of reach"
        self._tables[client] = {}

    def leave(self, client: bytes) -> None:
        """End all that a client has left; nobody is there to be told."""
        self._scheduler.finish_all(self._tables.pop(client).values(), FinishReason.ABORT)

    def of(self, client: bytes) -> dict[int, Request] | None:
        """A client's requests by handle, to be read; None if it is not here."""
        return self._tables.get(client)

    def __iter__(self) -> Iterator[Request]:
        for table in self._tables.values():
            yield from table.values()

    def add(self, request: Request) -> None:
        """A new request, or one that has become another client's."""
        self._tables[request.client][request.handle] = request

    def remove(self, request: Request) -> None:
        """A request is about to become another client's."""
        del self._tables[request.client][request.handle]

    def among(self, client: bytes, handles: Iterable[int]) -> list[Request]:
        """Those of a client that have these handles: each once, in the order of the handles."""
        table = self._tables[client]
        return [table[handle] for handle in dict.fromkeys(handles) if handle in table]

    # ---- how they end

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        message: str = "",
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        """End a request between two steps."""
        self._scheduler.finish(request, reason)
        self.tell_end(request, reason, message, kind)

    def finish_all(self, requests: Iterable[Request], reason: FinishReason) -> None:
        """As `finish`, for many at once."""
        requests = list(requests)
        self._scheduler.finish_all(requests, reason)
        for request in requests:
            self.tell_end(request, reason)

    def tell_end(
        self,
        request: Request,
        reason: FinishReason,
        message: str = "",
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        """A request has left the scheduler, in a step."""
        del self._tables[request.client][request.handle]
        self._delivery.end(request.client, request.handle, reason, message, kind)

    def check_ledger(self) -> None:
        """Assert what must hold between two calls. For tests."""
        for client, table in self._tables.items():
            assert all((r.client, r.handle) == (client, h) for h, r in table.items())
