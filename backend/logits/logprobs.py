"""Logprobs: the scores of a token and of its rivals in a row of logits.

Every row is worked on by itself: its numbers have the same bits in any batch. That is also the
fastest way through rows as long as a vocabulary, each of which then stays in the cache.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from footplate.backend.step import ScoredRows
from footplate.protocol.token_params import LogprobsMode

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

RAW_MODES = (LogprobsMode.RAW_LOGPROBS, LogprobsMode.RAW_LOGITS)
LOGIT_MODES = (LogprobsMode.RAW_LOGITS, LogprobsMode.PROCESSED_LOGITS)

_GROUP_SIZE = 64


def score_rows(
    rows: Iterable[FloatRow],
    token_ids: Sequence[int],
    position: int,
    num_most_likely: int,
    further_ids: Sequence[int],
    mode: LogprobsMode,
) -> ScoredRows:
    """Score one token per row.

    Each row of the result holds the token itself, then the most likely ones, best first and the
    lower id first among equals, then those asked for by id. Ids beyond the vocabulary score
    -infinity. The rank of a token is one more than the number of more likely ones.

    Args:
        rows: float32 [vocab] each, raw or processed.
        token_ids: one per row.
        position: of the first of them.
        num_most_likely: -1 is the whole vocabulary, as is everything larger than it.
        mode: whether logits are returned, or logprobs.
    """
    ranks: list[int] = []
    ids: list[Ids] = []
    scores: list[FloatRow] = []
    further = np.array(further_ids, np.intp)
    for row, token_id in zip(rows, token_ids, strict=True):
        row = np.ascontiguousarray(row)
        size = len(row) if num_most_likely < 0 else min(num_most_likely, len(row))
        own = np.concatenate([np.array([token_id], np.intp), most_likely(row, size), further])
        exists = own < len(row)
        chosen = row[np.where(exists, own, 0)]
        chosen[~exists] = -np.inf
        ranks.append(1 + int(np.count_nonzero(row > chosen[0])))
        ids.append(own)
        scores.append(chosen if mode in LOGIT_MODES else log_softmax(chosen, row))
    return ScoredRows(
        position,
        ranks,
        np.concatenate(ids).astype("<i4").tobytes(),
        np.concatenate(scores).astype("<f4").tobytes(),
    )


def log_softmax(logits: FloatRow, row: FloatRow) -> FloatRow:
    """Logprobs of some logits of a row, each rounded once. A row without a possible token gives
    -infinity, one with a NaN or +infinity NaN."""
    largest = float(row.max())
    if largest == -math.inf:
        return logits
    if not math.isfinite(largest):
        return np.full_like(logits, np.nan)
    exponentials = row - np.float32(largest)
    np.exp(exponentials, out=exponentials)
    total = largest + math.log(float(exponentials.sum()))
    return (logits.astype(np.float64) - total).astype(np.float32)


def most_likely(row: FloatRow, size: int) -> Ids:
    """Ids of the largest numbers of a row, descending; the lower id first among equals."""
    if not size:
        return np.empty(0, np.intp)
    if size == len(row):
        return np.argsort(-row, kind="stable")
    candidates = np.flatnonzero(row >= _bound_of_rank(row, size))
    if len(candidates) < size:
        # NaNs, which are equal to nothing, leave too few. Their order means nothing either.
        return np.arange(size)
    numbers = row[candidates]
    place = len(numbers) - size
    border = np.partition(numbers, place)[place]
    above = np.flatnonzero(numbers > border)
    above = above[np.argsort(-numbers[above], kind="stable")]
    equal = np.flatnonzero(numbers == border)[: size - len(above)]
    found: Ids = candidates[np.concatenate([above, equal])]
    return found


def _bound_of_rank(row: FloatRow, size: int) -> float:
    """A number that at least `size` of a row reach, and few others: the best of many groups stand
    for different tokens each. To look for it takes a tenth of what selecting from all takes."""
    num_groups = len(row) // _GROUP_SIZE
    if num_groups < 2 * size:
        return -math.inf
    best = row[: num_groups * _GROUP_SIZE].reshape(_GROUP_SIZE, num_groups).max(0)
    return float(np.partition(best, num_groups - size)[num_groups - size])
