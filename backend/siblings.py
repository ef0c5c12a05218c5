"""The `n` requests of one AddRequest: one prompt, computed once."""

from collections import deque
from collections.abc import Container

from footplate.backend.logits.wanted import wants_prompt_logprobs
from footplate.backend.request import Request, State


class Siblings:
    """Owns who of them computes the prompt, who is held until that is done, and who runs.

    The first computes the prompt, and tells its logprobs if they are wanted. Then the others are
    let go: each shares the full blocks of the prompt with one that runs, and computes the rest of
    the last one itself. When the first ends or is parked too early, the next takes its place.

    Attributes:
        num_shared_blocks: full blocks that all of them begin with; 0 where blocks cannot be shared.
        num_queued: how many have not had their first step.
    """

    def __init__(self, requests: list[Request], num_shared_blocks: int) -> None:
        first, *others = requests
        self.num_shared_blocks = num_shared_blocks
        self.num_queued = len(requests)
        self._first = first
        self._num_scored = first.num_scored
        # There is something to wait for, or everyone may run at once.
        waits = num_shared_blocks > 0 or wants_prompt_logprobs(first)
        self._held = deque(others if waits else ())
        self._ready = [first] if waits else requests
        self._running: dict[int, Request] = {}
        for request in others:
            request.num_scored = request.num_prompt_tokens

    @property
    def ready(self) -> list[Request]:
        """Those that need not wait for another; some may have ended."""
        return self._ready

    def let_go(self) -> list[Request]:
        """The prompt is computed: who has waited for that."""
        waited = [request for request in self._held if request.state is State.HELD]
        self._held.clear()
        return waited

    def replace(self, ended: Request) -> Request | None:
        """The next one to compute the prompt, if it was `ended` (or parked) that would have."""
        if ended is not self._first:
            return None
        while self._held:
            heir = self._held.popleft()
            if heir.state is State.HELD:
                # It tells all of the prompt's logprobs: they are parts of one stream.
                heir.num_scored = self._num_scored
                ended.num_scored = ended.num_prompt_tokens
                self._first, self._ready = heir, [heir]
                return heir
        return None

    def admitted(self, request: Request) -> None:
        """One of them holds blocks."""
        self._running[request.key] = request

    def displaced(self, request: Request) -> None:
        """One of them has lost its blocks."""
        del self._running[request.key]

    def find_donor(self, block_size: int) -> Request | None:
        """One that runs and has computed all that can be shared."""
        num_tokens = self.num_shared_blocks * block_size
        for request in self._running.values():
            if num_tokens and request.num_computed_tokens >= num_tokens:
                return request
        return None

    def check_ledger(self, running: Container[int]) -> None:
        """Assert what must hold between two steps, given the keys of all that run. For tests."""
        assert all(key in running for key in self._running)
        assert {request.state for request in self._held} <= {State.HELD, State.FINISHED}
        assert self.num_queued >= 0
