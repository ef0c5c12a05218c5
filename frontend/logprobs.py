"""Logprobs as a user reads them, made of the rows that the core sends. Names are vLLM's."""

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, overload

import msgspec

from footplate.protocol.messages import LogprobRows


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """What the model said of one token.

    Attributes:
        logprob: natural logarithm of its probability, or what `logprobs_mode` asks for instead.
        rank: 1 is the most likely token; None for tokens that were asked for by id.
        decoded_token: its text; None without detokenizing.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsOnePosition: TypeAlias = dict[int, Logprob]
"""By token id: the token itself first, then the most likely ones, then those asked for by id."""


class FlatLogprobs(Sequence[LogprobsOnePosition | None]):
    """Logprobs of many positions in five lists, for consumers to which an object per token is too
    much. Reads like the list of dictionaries that it takes the place of.

    Attributes:
        start_indices: where each position's entries begin in the lists below.
        end_indices: where they end. Equal to the start where a position has none.
    """

    def __init__(self) -> None:
        self.start_indices: list[int] = []
        self.end_indices: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self.decoded_tokens: list[str | None] = []

    def append(self, position: LogprobsOnePosition | None) -> None:
        """Add a position behind the last one."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (position or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> LogprobsOnePosition | None: ...

    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...

    def __getitem__(self, index: int | slice) -> "LogprobsOnePosition | FlatLogprobs | None":
        if isinstance(index, slice):
            part = FlatLogprobs()
            for position in range(*index.indices(len(self))):
                part.append(self[position])
            return part
        span = range(self.start_indices[index], self.end_indices[index])
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in span
        } or None

    def __iter__(self) -> Iterator[LogprobsOnePosition | None]:
        return map(self.__getitem__, range(len(self)))


Logprobs: TypeAlias = list[LogprobsOnePosition | None] | FlatLogprobs


class ScoredTokens:
    """Owns the rows of one sequence of tokens, an output or a prompt, as far as they have come.

    Args:
        num_token_ids: how many entries of each row were asked for by id; they stand last.
        decode: the text of a token; None leaves it out.
    """

    __slots__ = ("_decode", "_entries", "_first_position", "_num_token_ids", "_rows", "cumulative")

    def __init__(self, num_token_ids: int, decode: Callable[[int], str] | None) -> None:
        self._num_token_ids = num_token_ids
        self._decode = decode
        self._first_position = 0
        self._rows: list[tuple[int, array[int], array[float]]] = []
        self._entries: list[LogprobsOnePosition] = []  # of the first rows, as far as they are kept
        self.cumulative: list[float] = []  # logprob of the tokens up to each row

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: LogprobRows) -> bool:
        """Take rows, less those that have come before; False if some are missing in between."""
        if not self._rows:
            self._first_position = rows.position
        num_known = len(self._rows) - (rows.position - self._first_position)
        if num_known < 0:
            return False
        ids, logprobs = _unpack("i", rows.token_ids), _unpack("f", rows.logprobs)
        if len(ids) != len(logprobs) or len(ids) % len(rows.ranks):
            raise ValueError(f"{len(ids)} token ids, {len(logprobs)} logprobs: not whole rows")
        width = len(ids) // len(rows.ranks)
        for number in range(num_known, len(rows.ranks)):
            span = slice(number * width, (number + 1) * width)
            self._rows.append((rows.ranks[number], ids[span], logprobs[span]))
            total = self.cumulative[-1] if self.cumulative else 0.0
            self.cumulative.append(total + logprobs[number * width])
        return True

    def cumulative_up_to(self, end: int) -> float:
        """Sum of the logprobs of tokens before position `end`, as far as they were scored."""
        num_rows = end - self._first_position
        return self.cumulative[num_rows - 1] if self.cumulative and num_rows > 0 else 0.0

    def read(self, start: int, end: int, *, flat: bool) -> Logprobs:
        """Positions from `start` up to `end`; None stands where a position has not been scored.

        Who reads from the start will do so again with every token, and then finds the dictionaries
        of the time before: otherwise the cost of an output would grow with its square.
        """
        result: Logprobs = FlatLogprobs() if flat else []
        for position in range(start, end):
            index = position - self._first_position
            if not (self._rows and 0 <= index < len(self._rows)):
                result.append(None)
                continue
            if index < len(self._entries):
                entries = self._entries[index]
            else:
                entries = self._make_entries(*self._rows[index])
                if index == len(self._entries) and start <= self._first_position:
                    self._entries.append(entries)
            result.append(entries)
        return result

    def _make_entries(
        self, rank: int, ids: "array[int]", logprobs: "array[float]"
    ) -> LogprobsOnePosition:
        num_ranked = len(ids) - self._num_token_ids
        entries: LogprobsOnePosition = {}
        for index, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if token_id not in entries:  # one of the most likely may be the token itself
                own = (index or rank) if index < num_ranked else None
                text = None if self._decode is None else self._decode(token_id)
                entries[token_id] = Logprob(logprob, own, text)
        return entries


def _unpack(kind: str, data: bytes) -> "array[Any]":
    numbers: array[Any] = array(kind, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
