"""Large zeroed memory that costs nothing until it is used, and little when it is.

The operating system hands out zeroed pages when they are first touched, each for the price of an
interrupt: in a virtual machine 10 us for 4 KiB, a quarter of the time of a prompt whose keys and
values go to fresh memory. In huge pages of 2 MiB, where the system has them, that is gone.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from footplate.backend.kernels.touched_memory import HUGE_PAGE_BYTES, TouchedMemory

CACHE_LINE_BYTES = 64


def zeroed(
    shape: Sequence[int], dtype: torch.dtype, touched: TouchedMemory | None = None
) -> torch.Tensor:
    """A zeroed CPU tensor that begins on a cache line, and on a huge page if it fills one.

    torch.zeros writes all of it at once, 1.3 s per GiB, also the part that nobody ever uses.

    Args:
        touched: taken if the tensor fits.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = touched.take(num_bytes) if touched else None
    if pages is None and num_bytes >= HUGE_PAGE_BYTES:
        with suppress(OSError, AttributeError):  # too many mappings; not Linux
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=flags)
    if pages is None:
        memory = np.zeros(num_bytes + CACHE_LINE_BYTES, dtype=np.uint8)
        start = -memory.ctypes.data % CACHE_LINE_BYTES
    else:
        memory = np.frombuffer(pages, dtype=np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE_BYTES
        # No huge page for the rest behind the last whole one: most of it would lie idle.
        whole = num_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        with suppress(OSError, AttributeError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(*shape)
