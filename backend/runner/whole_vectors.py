"""Elementwise functions of torch whose results do not depend on where an element stands.

torch computes most elements of a tensor in vectors and the last few one by one, for some functions
by another formula: the last bit of tanh, erf or sigmoid then depends on how many rows are in the
batch, and on how torch shares them out to threads. In whole vectors, on one thread, it does not.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad

# Numbers that torch's elementwise loops take at a time: two registers, of bfloat16.
VECTOR = 64
# Up to so many elements torch gives to one thread; more are cut where it likes.
GRAIN = 32768


def in_whole_vectors(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`function` of every element of `x`, in the shape of `x`."""
    flat = x.reshape(-1)
    pieces = torch.split(pad(flat, (0, -len(flat) % VECTOR)), GRAIN)
    results = [function(piece) for piece in pieces]
    whole = results[0] if len(results) == 1 else torch.cat(results)
    return whole[: len(flat)].view(x.shape)
