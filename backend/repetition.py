"""When an output goes round in circles."""

from collections import deque
from collections.abc import Sequence
from itertools import islice

from footplate.protocol.token_params import RepetitionDetection


class RepetitionDetector:
    """Watches one output for a pattern that has been said `min_count` times in a row.

    The last c * p tokens are a pattern of size p, said c times, exactly if each of the last
    (c - 1) * p tokens equals the one p places before it. So for every size the length of the run
    of such tokens is all that has to be known: one comparison per size and token.

    Owns the last `max_pattern_size` tokens and, for every size, how many equal tokens are missing.
    """

    def __init__(self, wanted: RepetitionDetection, output: Sequence[int] = ()) -> None:
        """Args:
        output: what has been said already.
        """
        sizes = range(wanted.min_pattern_size, wanted.max_pattern_size + 1)
        self._min_pattern_size = wanted.min_pattern_size
        self._needed = [(wanted.min_count - 1) * size for size in sizes]
        runs = _match_lengths(output[::-1])
        runs += [0] * (wanted.max_pattern_size + 1 - len(runs))
        self._missing = [
            needed - run
            for needed, run in zip(self._needed, runs[wanted.min_pattern_size :], strict=False)
        ]
        # Newest first; None, where nothing has been said yet, equals no token.
        self._recent: deque[int | None] = deque(
            [None] * wanted.max_pattern_size, maxlen=wanted.max_pattern_size
        )
        self._recent.extendleft(output[-wanted.max_pattern_size :])

    @property
    def is_repeating(self) -> bool:
        """Whether the output so far ends with such a pattern."""
        return min(self._missing) <= 0

    def advance(self, token_id: int) -> bool:
        """Take the next token; whether the output ends with such a pattern now."""
        past = islice(self._recent, self._min_pattern_size - 1, None)
        self._missing = [
            missing - 1 if before == token_id else needed
            for missing, needed, before in zip(self._missing, self._needed, past, strict=True)
        ]
        self._recent.appendleft(token_id)
        return self.is_repeating


def _match_lengths(tokens: Sequence[int]) -> list[int]:
    """For every place, how many tokens from there on equal those from the start on.

    The Z algorithm (Gusfield 1997, "Algorithms on Strings, Trees, and Sequences", section 1.3):
    linear, where comparing at every place would let one long output stall the step.
    """
    lengths = [0] * len(tokens)
    left = right = 0  # the match that reaches furthest is tokens[left:right]
    for place in range(1, len(tokens)):
        length = min(lengths[place - left], right - place) if place < right else 0
        while place + length < len(tokens) and tokens[length] == tokens[place + length]:
            length += 1
        lengths[place] = length
        if place + length > right:
            left, right = place, place + length
    return lengths
