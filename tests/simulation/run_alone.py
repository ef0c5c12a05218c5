"""Requests that are to be run alone, for an engine core that does not look at that yet."""

from collections import deque
from collections.abc import Iterable

from msgspec.structs import replace

from footplate.backend.engine_core import EngineCore
from footplate.protocol.messages import AddRequest, StepOutputs


class RunAloneGate:
    """Stands before an engine core and lets in one request at a time, as long as there are some
    to be run alone: until each has a new token, or has ended."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._queue: deque[tuple[bytes, AddRequest, float]] = deque()
        self._alone: tuple[bytes, range] | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, client: bytes, message: AddRequest, now: float) -> None:
        """A request has come."""
        self._queue.append((client, message, now))

    def abort(self, client: bytes, handles: Iterable[int]) -> None:
        """Their ends are nobody's concern any more."""
        gone = set(handles)
        self._queue = deque(e for e in self._queue if e[0] != client or e[1].handle not in gone)

    def leave(self, client: bytes) -> None:
        """A client is gone."""
        self._queue = deque(entry for entry in self._queue if entry[0] != client)

    def open(self, now: float) -> None:
        """Let in who may take part in the next step."""
        stats = self._core.stats()
        is_empty = not stats.num_running and not stats.num_waiting
        if self._alone is not None and not is_empty:
            return
        self._alone = None
        for entry in self._queue:
            if entry[1].run_alone:
                if is_empty:
                    self._queue.remove(entry)
                    client, message, _ = entry
                    self._alone = (client, range(message.handle, message.handle + message.n))
                    self._let_in(entry, now)
                return
        while self._queue:
            self._let_in(self._queue.popleft(), now)

    def _let_in(self, entry: tuple[bytes, AddRequest, float], now: float) -> None:
        client, message, since = entry
        self._core.handle(client, replace(message, age_s=message.age_s + now - since))

    def look_at(self, client: bytes, outputs: StepOutputs) -> None:
        """A new token sets the others free."""
        if self._alone is not None and self._alone[0] == client:
            handles = self._alone[1]
            if any(handle in handles for handle in outputs.handles):
                self._alone = None
