"""Where min_p, top_k and top_p cut: the smallest probability in a row that may still be chosen.

All three keep the most likely tokens and drop the rest, so whatever they do together is one
number per row. It follows that equally likely tokens are kept or dropped together: at a tie on
the border more than top_k tokens stay (as in vLLM and transformers), and the row's order of token
ids has no say.
"""

import numpy as np
import torch

# Weights are probabilities in units of 2**-52, rounded down. Sums of integers do not depend on
# their order, so they are equal on every path, batch and device; and a whole row sums to less
# than 2**53, so a float64 holds every sum exactly.
WEIGHT_ONE = 2.0**52

# How many of a row's most likely tokens to sort at first: finding them costs more than sorting
# them. A trained model's top_p of 0.95 is nearly always reached among them; a row where it is
# not is looked at again.
_HEAD = 4096


def weigh(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities to integer weights, int64 of the same shape."""
    return (probs * WEIGHT_ONE).to(torch.int64)


def drop_below(probs: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """Return `probs` [num_rows, vocab] with what is below its row's `cutoff` [num_rows, 1] at 0."""
    # Comparing into floats and multiplying is vectorised; torch.where is not, and takes four
    # times as long.
    return torch.ge(probs, cutoff, out=torch.empty_like(probs)).mul_(probs)


def find_cutoff(
    probs: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Return the cutoff of each row: tokens at or above it are kept, and there is at least one.

    The order is vLLM's: min_p, then top_k of what is left, then top_p of the mass of what is
    left then.

    Args:
        probs: float32 [num_rows, vocab], no NaN.
        min_p: float32 [num_rows, 1]; 0 keeps all.
        top_k: int64 [num_rows, 1]; 0 keeps all.
        top_p: float64 [num_rows, 1]; 1 keeps all.

    Returns:
        float32 [num_rows, 1].
    """
    cutoff = min_p * probs.amax(-1, keepdim=True)
    limited = (top_k > 0) & (top_k < probs.shape[-1])
    nucleus = top_p < 1
    if not (limited | nucleus).any():
        return cutoff
    head = _most_likely(probs, max(_HEAD, int((top_k * limited).max())))
    kth = head.gather(-1, (top_k - 1).clamp(0, head.shape[-1] - 1))
    cutoff = torch.maximum(cutoff, kth * limited)
    if nucleus.any():
        needed = (top_p * _mass_from(probs, head, cutoff)).ceil().long()
        cutoff = torch.where(nucleus, _nucleus_border(probs, head, needed * nucleus), cutoff)
    return cutoff


def _mass_from(probs: torch.Tensor, head: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """Total weight at or above the cutoff, int64 [num_rows, 1]."""
    if bool((head[:, -1:] < cutoff).all()):
        return weigh(drop_below(head, cutoff)).sum(-1, keepdim=True)
    kept = drop_below(probs, cutoff) if bool(cutoff.any()) else probs
    return weigh(kept).sum(-1, keepdim=True)


def _nucleus_border(probs: torch.Tensor, head: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """The probability of the token with which the most likely tokens reach the weight `needed`,
    which they all together do. `head` holds the largest of each row of `probs`, descending."""
    mass = weigh(head).cumsum(-1)
    index = torch.searchsorted(mass, needed)
    border = head.gather(-1, index.clamp(max=head.shape[-1] - 1))
    short = (mass[:, -1:] < needed).squeeze(-1).nonzero().squeeze(-1)
    if len(short):
        # Flat rows. The size of the head decides their cost, not their result.
        longer = _most_likely(probs[short], 16 * head.shape[-1])
        border[short] = _nucleus_border(probs[short], longer, needed[short])
    return border


def _most_likely(probs: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` largest values of each row, descending; the whole row if it has fewer."""
    size = min(size, probs.shape[-1])
    if probs.device.type != "cpu":
        return probs.topk(size, -1).values
    # Values without their indices are all that is needed, and numpy's vectorised selection
    # finds them in a quarter of the time of torch.topk, and sorts in a twentieth of torch.sort's.
    values = probs.numpy()
    if size < values.shape[-1]:
        values = np.partition(values, values.shape[-1] - size, axis=-1)[:, -size:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())
