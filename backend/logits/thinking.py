"""A bound on how long a model thinks before it answers."""

from collections.abc import Iterable, Sequence

from footplate.protocol.token_params import ThinkingBudget


class ThinkingState:
    """Whether the tokens so far, prompt and output, end inside of thinking, and for how long.

    Outside of it only its start is looked for, inside only its end, so neither a second start
    nor an overlap of the two gives a model more time.
    """

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._start, self._end = _Search(budget.start_ids), _Search(budget.end_ids)
        self._is_inside = False
        self._num_tokens = 0

    def add(self, token_ids: Iterable[int]) -> None:
        """Take the next tokens."""
        for token_id in token_ids:
            search = self._end if self._is_inside else self._start
            self._num_tokens += 1
            if search.add(token_id):
                self._is_inside = not self._is_inside
                self._num_tokens = 0

    @property
    def forced(self) -> int | None:
        """The token that must come next, when the budget is spent: what is still missing of the
        end."""
        if not self._is_inside or self._num_tokens < self._budget.num_tokens:
            return None
        return self._end.next


class _Search:
    """Finds a pattern in a stream of tokens (Knuth, Morris and Pratt 1977)."""

    def __init__(self, pattern: Sequence[int]) -> None:
        self._pattern = pattern
        self._matched = 0
        # By number of tokens that match: how many still do if the next one does not.
        self._fallback = [0, 0]
        for token_id in pattern[1:]:
            self._fallback.append(self._extend(self._fallback[-1], token_id))

    def _extend(self, matched: int, token_id: int) -> int:
        while matched and self._pattern[matched] != token_id:
            matched = self._fallback[matched]
        return matched + (self._pattern[matched] == token_id)

    def add(self, token_id: int) -> bool:
        """Take a token; whether the pattern ends with it. Then the search begins anew."""
        self._matched = self._extend(self._matched, token_id)
        is_found = self._matched == len(self._pattern)
        if is_found:
            self._matched = 0
        return is_found

    @property
    def next(self) -> int:
        """The token that would go on with what matches already."""
        return self._pattern[self._matched]
