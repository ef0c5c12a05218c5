"""Which requests have run out of time."""

from heapq import heapify, heappop, heappush

from footplate.backend.request import Request, State

_Entry = tuple[float, int, bool, Request]


class Deadlines:
    """Owns the deadlines of all requests that have one, the next one first.

    A deadline that no longer matters (its request has ended, or has its first token) stays until it
    comes up, or until such ones are half of all.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._sweep_at = 64

    def add(self, request: Request, ttft_s: float | None, total_s: float | None) -> None:
        """Watch a request.

        Args:
            ttft_s: most seconds from its arrival to its first token; None is no limit.
            total_s: likewise to its last.
        """
        for seconds, until_first in ((ttft_s, True), (total_s, False)):
            if seconds is not None:
                due = request.arrival_time + seconds
                heappush(self._heap, (due, request.key, until_first, request))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if _matters(entry)]
            heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + 64

    @property
    def next_due(self) -> float | None:
        """When the next one passes, on the core's clock."""
        while self._heap and not _matters(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_overdue(self, now: float) -> list[Request]:
        """Requests whose time is up, each once."""
        overdue: dict[int, Request] = {}
        while self._heap and self._heap[0][0] <= now:
            entry = heappop(self._heap)
            if _matters(entry):
                overdue[entry[3].key] = entry[3]
        return list(overdue.values())


def _matters(entry: _Entry) -> bool:
    _, _, until_first, request = entry
    return request.state is not State.FINISHED and not (until_first and request.num_output_tokens)
