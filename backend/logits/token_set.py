"""Sets of tokens that grammars allow, made from bit masks and kept: most masks are those of an
earlier step or of another request."""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

FloatRow = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int32]
Ids = npt.NDArray[np.intp]

MAX_BYTES = 32 * 2**20
FEW = 8  # of the vocabulary, one in so many: then ids are faster than a row
NARROW = 1024  # tokens: rows of fewer are worth copying

# A byte of a mask becomes eight floats.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_CEILINGS = np.where(_BITS == 1, np.float32(np.inf), np.float32(-np.inf))


class TokenSet:
    """Which tokens may come next.

    Attributes:
        ceiling: float32 [vocab]: inf for tokens of the set, -inf for others.
        num_tokens: in the set.
        narrow: the ids of all tokens of the set, ascending, if it has so few that a token is best
            drawn from a row of their logits alone; else None.
    """

    __slots__ = ("_inside", "_outside", "ceiling", "narrow", "num_tokens")

    def __init__(self, mask: Mask, vocab_size: int) -> None:
        """Args:
        mask: bit i % 32 of word i // 32 is token i. Bits behind the vocabulary are nobody's.
        """
        self.ceiling = _CEILINGS[mask.view(np.uint8)].reshape(-1)[:vocab_size]
        is_inside = self.ceiling > 0
        self.num_tokens = int(np.count_nonzero(is_inside))
        self._inside: Ids | None = None
        self._outside: Ids | None = None
        if self.num_tokens < vocab_size // FEW:
            self._inside = np.flatnonzero(is_inside)
        elif vocab_size - self.num_tokens < vocab_size // FEW:
            self._outside = np.flatnonzero(~is_inside)
        self.narrow = self._inside if self.num_tokens <= NARROW else None

    def restrict(self, row: FloatRow) -> None:
        """Write -inf to all other tokens of a row, float32 [vocab]."""
        if self._inside is not None:
            logits = row[self._inside]
            row.fill(-np.inf)
            row[self._inside] = logits
        elif self._outside is not None:
            row[self._outside] = -np.inf
        else:
            # `fmin` takes the ceiling, not a NaN, so that a bad logit of an impossible token is as
            # much out of the way as above; one of a possible token becomes inf, which is noticed.
            np.fmin(row, self.ceiling, out=row)

    def count(self, token_ids: Ids) -> int:
        """How many of these are in the set."""
        return int(np.count_nonzero(self.ceiling[token_ids] > 0))


class TokenSets:
    """Owns sets that may be asked for again: least recently used go first. For one thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._sets: OrderedDict[tuple[int, bytes], TokenSet] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sets)

    def of(self, mask: Mask, vocab_size: int) -> TokenSet:
        """The set of a mask. To be read only."""
        key = (vocab_size, mask.tobytes())
        if found := self._sets.get(key):
            self._sets.move_to_end(key)
            return found
        made = self._sets[key] = TokenSet(mask, vocab_size)
        # A ceiling of 4 bytes per token, ids of an eighth of them at most, and the key.
        if len(self._sets) > max(1, self._max_bytes // (6 * vocab_size)):
            self._sets.popitem(last=False)
        return made
