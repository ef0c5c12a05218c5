"""Logprobs: the scores of a token and of its rivals in a row of logits.

Every row is worked on by itself: its numbers have the same bits in any batch. That is also the
fastest way through rows as long as a vocabulary, each of which then stays in the cache.

The sum over a row is most of the work. Where there are kernels one of them does it, and its last
bits are others than numpy's: an engine takes one of the two for all rows.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.most_likely import most_likely
from footplate.backend.step import ScoredRows
from footplate.protocol.token_params import LogprobsMode

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

RAW_MODES = (LogprobsMode.RAW_LOGPROBS, LogprobsMode.RAW_LOGITS)
LOGIT_MODES = (LogprobsMode.RAW_LOGITS, LogprobsMode.PROCESSED_LOGITS)

Normaliser = Callable[[FloatRow], float]


def score_rows(
    rows: Iterable[FloatRow],
    token_ids: Sequence[int],
    position: int,
    num_most_likely: int,
    further_ids: Sequence[int],
    mode: LogprobsMode,
    normalise: Normaliser,
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
        normalise: `log_sum_exp`, or a kernel that does the same.
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
        # Whatever is more likely than one of the most likely is one of them too.
        is_among = size and chosen[0] >= chosen[size]
        rivals = chosen[1 : size + 1] if is_among else row
        ranks.append(1 + int(np.count_nonzero(rivals > chosen[0])))
        ids.append(own)
        if mode not in LOGIT_MODES:
            chosen = log_softmax(chosen, normalise(row))
        scores.append(chosen)
    return ScoredRows(
        position,
        ranks,
        np.concatenate(ids).astype("<i4").tobytes(),
        np.concatenate(scores).astype("<f4").tobytes(),
    )


def log_softmax(logits: FloatRow, total: float) -> FloatRow:
    """Logprobs of some logits of a row, each rounded once.

    Args:
        total: the `log_sum_exp` of the row.
    """
    if total == -math.inf:
        return logits  # no token is possible, these neither
    return (logits.astype(np.float64) - total).astype(np.float32)


def log_sum_exp(row: FloatRow) -> float:
    """The logarithm of the sum of e^logit. A row without a possible token gives -infinity, one with
    a NaN or +infinity NaN."""
    largest = float(row.max())
    if largest == -math.inf:
        return largest
    if not math.isfinite(largest):
        return math.nan
    exponentials = row - np.float32(largest)
    np.exp(exponentials, out=exponentials)
    return largest + math.log(float(exponentials.sum()))
