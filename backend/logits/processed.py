"""What a row looks like to the draw: divided by the temperature, and cut by min_p, top_k, top_p.

The sampler does this on its own way to a token, faster, and keeps no logits. Here it is done again
for whoever asks for processed logprobs.
"""

import math

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.most_likely import candidates
from footplate.protocol.token_params import TokenParams

FloatRow = npt.NDArray[np.float32]

# Below this, dividing by the temperature loses the difference between two logits; vLLM's bound.
MIN_TEMPERATURE = 0.01
# As flat as it gets; infinity would turn masked logits into NaN.
MAX_TEMPERATURE = float(np.finfo(np.float32).max)

# Weights are probabilities in units of 2**-52, rounded down: see the runner's `cutoff`.
WEIGHT_ONE = 2.0**52


def effective_temperature(temperature: float) -> float:
    """The temperature that a row is divided by, of one that is not 0."""
    return min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def process_row(row: FloatRow, params: TokenParams, chosen: int | None) -> FloatRow:
    """Return a row, adjusted already, as the draw sees it: what is cut has -infinity.

    Greedy requests (temperature 0) are divided by nothing and cut by nothing.

    Args:
        chosen: the token that was drawn, and therefore was not cut. The sampler's softmax rounds
            differently in its last bits, and this keeps the two from disagreeing at a border.
    """
    if params.temperature == 0:
        return row.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        row = row / np.float32(effective_temperature(params.temperature))
        largest = row.max()
        if not np.isfinite(largest) or not (params.min_p or params.top_k or params.top_p < 1):
            return row
        probs = np.exp(row - largest)
        probs /= probs.sum()
    cutoff = find_cutoff(probs, params)
    if chosen is not None:
        cutoff = min(cutoff, probs[chosen])
    kept = np.flatnonzero(probs >= cutoff)  # mostly few
    processed = np.full_like(row, -np.inf)
    processed[kept] = row[kept]
    return processed


def find_cutoff(probs: FloatRow, params: TokenParams) -> np.float32:
    """The smallest probability that is kept, by the definition in the runner's `cutoff`: min_p,
    then top_k of what is left, then top_p of the mass that is left then."""
    kept = probs
    cutoff: np.float32 = np.float32(params.min_p) * probs.max()
    if 0 < params.top_k < len(probs):
        kept = probs[candidates(probs, params.top_k)]
        place = len(kept) - params.top_k
        cutoff = max(cutoff, np.partition(kept, place)[place])
    if params.top_p < 1:
        kept = kept[kept >= cutoff]
        total = int(_weigh(kept).sum())
        needed = math.ceil(params.top_p * float(total))
        # Were the border below this, all tokens below it together could not weigh what top_p
        # drops. A little less, because of rounding. It saves sorting nearly all of the row.
        share = (total - needed) / len(kept) / WEIGHT_ONE * 0.999
        likely = np.sort(kept[kept >= share])[::-1]
        cutoff = likely[np.searchsorted(_weigh(likely).cumsum(), needed)]
    return cutoff


def _weigh(probs: FloatRow) -> npt.NDArray[np.int64]:
    return (probs.astype(np.float64) * WEIGHT_ONE).astype(np.int64)
