"""What the engine core is still to be told about requests that it has."""

from collections.abc import Callable, Iterable

from footplate.protocol.messages import AbortRequests, ParkRequests, ResumeRequests

Notice = AbortRequests | ParkRequests | ResumeRequests


class Notices:
    """Gathers them until somebody takes them: ten thousand streams that are left in one turn of the
    event loop are one message. What is revoked before it was taken is never said.

    Attributes:
        on_first: called when there is something to take, and there was nothing before.
    """

    def __init__(self) -> None:
        self.on_first: Callable[[], object] = lambda: None
        self._aborted: dict[int, None] = {}
        self._ended: dict[int, None] = {}
        self._parked: dict[int, None] = {}
        self._resumed: dict[int, None] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._aborted or self._ended or self._parked or self._resumed)

    def abort(self, handles: Iterable[int]) -> None:
        """Nobody wants anything more of these."""
        self._note(self._aborted, dict.fromkeys(handles))

    def end(self, handle: int) -> None:
        """This one has come to its end here, by a stop string, and is to be kept like that."""
        self._note(self._ended, {handle: None})

    def park(self, handle: int) -> None:
        """Nobody reads what this one produces."""
        if handle in self._resumed:
            del self._resumed[handle]
        else:
            self._note(self._parked, {handle: None})

    def resume(self, handle: int) -> None:
        """Somebody does again."""
        if handle in self._parked:
            del self._parked[handle]
        else:
            self._note(self._resumed, {handle: None})

    def _note(self, kind: dict[int, None], handles: dict[int, None]) -> None:
        is_first = not self and bool(handles)
        kind.update(handles)
        if is_first:
            self.on_first()

    def take(self) -> list[Notice]:
        """Everything: a message of each kind at most."""
        notices: list[Notice] = []
        if self._aborted:
            notices.append(AbortRequests(list(self._aborted)))
        if self._ended:
            notices.append(AbortRequests(list(self._ended), have_ended=True))
        if self._parked:
            notices.append(ParkRequests(list(self._parked)))
        if self._resumed:
            notices.append(ResumeRequests(list(self._resumed)))
        for kind in (self._aborted, self._ended, self._parked, self._resumed):
            kind.clear()
        return notices
