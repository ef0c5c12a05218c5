"""Large zeroed memory that costs nothing until it is used."""

import math
from collections.abc import Sequence

import numpy as np
import torch

CACHE_LINE_BYTES = 64


def lazily_zeroed(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed CPU tensor that begins on a cache line.

    calloc, through NumPy: the operating system hands out zeroed pages when they are first written.
    torch.zeros writes all of them, 1.3 s per GiB, also the ones that nobody ever uses.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + CACHE_LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE_BYTES
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(*shape)
