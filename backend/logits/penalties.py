"""Repetition, frequency and presence penalties, in time that does not grow with the vocabulary."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from footplate.protocol.token_params import LogitAdjustments

FloatRow = npt.NDArray[np.float32]


class Penalties:
    """Owns which tokens a request has seen, and how often each is in its output: two columns that
    grow by at most one entry per token."""

    def __init__(self, adjustments: LogitAdjustments, vocab_size: int) -> None:
        self._repetition = adjustments.repetition_penalty
        self._frequency = adjustments.frequency_penalty
        self._presence = adjustments.presence_penalty
        self._vocab_size = vocab_size
        self._places: dict[int, int] = {}  # of token ids in the columns
        self._ids = np.empty(64, np.intp)
        self._counts = np.zeros(64, np.float64)

    @staticmethod
    def are_wanted(adjustments: LogitAdjustments) -> bool:
        """Whether they would change anything."""
        return bool(
            adjustments.repetition_penalty != 1.0
            or adjustments.frequency_penalty
            or adjustments.presence_penalty
        )

    def add_prompt(self, token_ids: Iterable[int]) -> None:
        """Only the repetition penalty looks at the prompt."""
        if self._repetition != 1.0:
            for token_id in token_ids:
                self._place_of(token_id)

    def add_output(self, token_ids: Iterable[int]) -> None:
        """Count the next tokens of the output."""
        for token_id in token_ids:
            place = self._place_of(token_id)
            if place >= 0:
                self._counts[place] += 1

    def _place_of(self, token_id: int) -> int:
        place = self._places.get(token_id)
        if place is None:
            if token_id >= self._vocab_size:
                return -1  # there is no logit to change
            place = self._places[token_id] = len(self._places)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
        return place

    def apply(self, row: FloatRow) -> None:
        """Change the logits of seen tokens in place: repetition, then frequency, then presence."""
        size = len(self._places)
        if not size:
            return
        ids, counts = self._ids[:size], self._counts[:size]
        logits = row[ids].astype(np.float64)
        if self._repetition != 1.0:
            scaled = (logits / self._repetition, logits * self._repetition)
            logits = np.where(logits > 0, *scaled)
        logits -= self._frequency * counts
        logits -= self._presence * (counts > 0)
        row[ids] = logits
