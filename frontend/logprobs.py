"""Logprobs as a user reads them, made of the rows that the core sends. Names are vLLM's."""

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        entries = (position or {}).values()
        self.extend(
            (position or {}).keys(),
            [entry.logprob for entry in entries],
            [entry.rank for entry in entries],
            [entry.decoded_token for entry in entries],
        )

    def extend(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """As `append`, by column. No id comes twice."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.ranks.extend(ranks)
        self.decoded_tokens.extend(decoded_tokens)
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


_Columns: TypeAlias = tuple[
    Iterable[int], Iterable[float], Iterable[int | None], Iterable[str | None]
]
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

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self._first_position + len(self._rows)

    def add(self, rows: LogprobRows) -> bool:
        """Take rows, less those that have come before; False if some are missing in between.

        Raises:
            ValueError: the columns do not fit together.
        """
        if not self._rows:
            self._first_position = rows.position
        num_known = len(self._rows) - (rows.position - self._first_position)
        if num_known < 0:
            return False
        ids, logprobs = _unpack("i", rows.token_ids), _unpack("f", rows.logprobs)
        if len(ids) != len(logprobs) or not ids or not rows.ranks or len(ids) % len(rows.ranks):
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
        """Positions from `start` up to `end`; None stands where a position has not been scored."""
        indices = range(start - self._first_position, end - self._first_position)
        known = range(len(self._rows))
        if flat:
            result = FlatLogprobs()
            for index in indices:
                result.extend(*(self._columns(*self._rows[index]) if index in known else 4 * ((),)))
            return result
        return [self._entries_at(index, start) if index in known else None for index in indices]

    def _entries_at(self, index: int, start: int) -> LogprobsOnePosition:
        """Who reads from the start will do so again with every token, and then finds the objects
        of the time before: otherwise the cost of an output would grow with its square."""
        if index < len(self._entries):
            return self._entries[index]
        columns = self._columns(*self._rows[index])
        entries = {
            token_id: Logprob(logprob, rank, text)
            for token_id, logprob, rank, text in zip(*columns, strict=True)
        }
        if index == len(self._entries) and start <= self._first_position:
            self._entries.append(entries)
        return entries

    def _columns(self, rank: int, ids: "array[int]", logprobs: "array[float]") -> _Columns:
        """Token ids, logprobs, ranks and texts of a row, each token once."""
        num_ranked = len(ids) - self._num_token_ids
        ranks = [rank, *range(1, num_ranked), *self._num_token_ids * [None]]
        columns = ids.tolist(), logprobs.tolist(), ranks
        if len(set(columns[0])) < len(ids):
            # One of the most likely may be the token itself, and those asked for by id any.
            first = {token_id: index for index, token_id in reversed([*enumerate(columns[0])])}
            kept = sorted(first.values())
            columns = tuple([column[index] for index in kept] for column in columns)  # type: ignore[assignment]
        decode = self._decode
        texts = [None] * len(columns[0]) if decode is None else [*map(decode, columns[0])]
        return *columns, texts


def _unpack(kind: str, data: bytes) -> "array[Any]":
    numbers: array[Any] = array(kind, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
