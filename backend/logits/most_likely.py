"""The largest numbers of a row as long as a vocabulary, without looking at many of them twice."""

import numpy as np
import numpy.typing as npt

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

# A row is dealt out to groups of this many: number i goes to group i modulo their count.
_GROUP_SIZE = 64


def most_likely(row: FloatRow, size: int) -> Ids:
    """Ids of the largest numbers of a row, descending; the lower id first among equals."""
    if not size:
        return np.empty(0, np.intp)
    if size == len(row):
        return np.argsort(-row, kind="stable")
    ids = candidates(row, size)
    if len(ids) < size:
        # NaNs, which are equal to nothing, leave too few. Their order means nothing either.
        return np.arange(size)
    numbers = row[ids]
    place = len(numbers) - size
    border = np.partition(numbers, place)[place]
    above = np.flatnonzero(numbers > border)
    above = above[np.argsort(-numbers[above], kind="stable")]
    equal = np.flatnonzero(numbers == border)[: size - len(above)]
    found: Ids = ids[np.concatenate([above, equal])]
    return found


def candidates(row: FloatRow, size: int) -> Ids:
    """Ids, ascending, of a few numbers that the `size` largest are among, no NaNs.

    The best of many groups stand for different tokens each, so the `size`-th best of them is a
    bound that enough numbers reach. To look for it takes a tenth of what selecting from all takes.
    """
    num_groups = len(row) // _GROUP_SIZE
    if num_groups < 2 * size:
        return np.flatnonzero(row >= -np.inf)
    grouped = num_groups * _GROUP_SIZE
    best = row[:grouped].reshape(_GROUP_SIZE, num_groups).max(0)
    bound = np.partition(best, num_groups - size)[num_groups - size]
    # Whoever reaches the bound is in a group whose best does, or behind all groups.
    groups = np.flatnonzero(best >= bound)
    if len(groups) > 4 * size:  # many are equal
        return np.flatnonzero(row >= bound)
    ids = (np.arange(0, grouped, num_groups)[:, np.newaxis] + groups).ravel()
    ids = np.concatenate([ids, np.arange(grouped, len(row))])
    found: Ids = ids[row[ids] >= bound]
    return found
