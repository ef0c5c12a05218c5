"""Sequences of tokens that an output does not contain."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class BadWords:
    """Which tokens would complete one of some words. Words are found by the token before their
    last one, so that a step looks at few of them."""

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        # A word that ends beyond the vocabulary cannot be said.
        words = [word for word in words if word[-1] < vocab_size]
        self._always = [word[-1] for word in words if len(word) == 1]
        self._longer: dict[int, list[tuple[list[int], int]]] = {}
        for word in words:
            if len(word) > 1:
                before = list(word[:-1])
                self._longer.setdefault(before[-1], []).append((before, word[-1]))

    def completing(self, token_ids: list[int], output_start: int) -> npt.NDArray[np.intp]:
        """Ids of the tokens that would complete a word.

        Args:
            token_ids: prompt and output.
            output_start: where the output starts; words do not reach back beyond it.
        """
        found = list(self._always)
        length = len(token_ids) - output_start
        if length:
            for before, last in self._longer.get(token_ids[-1], ()):
                if len(before) <= length and token_ids[-len(before) :] == before:
                    found.append(last)
        return np.array(found, np.intp)
