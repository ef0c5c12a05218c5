"""Packed weights in memory that the cores of one engine share: one that serves, one that waits.

The memory has no name: the supervisor makes it, and cores inherit its descriptor. The first core
that packs a model leaves its packed weights there and seals them. From then on the system lets
nobody write, so that a core that has gone wild cannot harm the next one's weights. Every other core
packs and verifies for itself, layer by layer, and then gives up its own layer for the shared one
if both are equal byte for byte. So there is nothing to agree on beforehand: another model, another
version of the kernels, or a file that has changed meanwhile only mean that nothing is shared.
"""

import ctypes
import fcntl
import logging
import mmap
import os

import numpy as np
import torch

logger = logging.getLogger(__name__)

# Linux; a memory file is never made elsewhere.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 1, 2, 4, 8
_ALL_SEALS = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE


class SharedWeights:
    """One core's view of the shared memory. Tensors lie there in the order in which they come,
    which is the same in every core.

    The view is for reading: a stray write ends the process instead of changing a weight.

    Args:
        file: a descriptor of a memory file, empty or sealed.
        max_bytes: of all that will be shared.
        may_fill: whether to fill it if it is not sealed. Only one process at a time may.
    """

    def __init__(self, file: int, max_bytes: int, *, may_fill: bool) -> None:
        self._file = file
        self._is_sealed = bool(fcntl.fcntl(file, _F_GET_SEALS) & _SEAL_WRITE)
        self._mapping: mmap.mmap | None = None
        self._address = self._size = self._end = 0
        if not self._is_sealed and may_fill:
            os.ftruncate(file, 0)  # of what somebody left who died meanwhile
            os.ftruncate(file, max_bytes)  # takes no memory before it is written
        if (self._is_sealed or may_fill) and (size := os.fstat(file).st_size):
            # Private, though it will never be written to: a shared view of a file that is open for
            # writing might become a writable one, and such a file cannot be sealed.
            self._mapping = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            self._address, self._size = np.frombuffer(self._mapping, np.uint8).ctypes.data, size
        self._memcmp = ctypes.CDLL(None).memcmp

    @property
    def num_bytes(self) -> int:
        """What is shared so far."""
        return self._end

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers in shared memory; `tensor` itself, if they cannot be shared.

        Args:
            tensor: contiguous, on the CPU.
        """
        start, end = self._end, self._end + tensor.nbytes
        if end > self._size or not self._has(tensor, start):
            return tensor
        self._end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = (ctypes.c_char * tensor.nbytes).from_address(self._address + start)
        memory.mapping = self._mapping  # type: ignore[attr-defined]  # lives as long as the tensor
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)

    def _has(self, tensor: torch.Tensor, start: int) -> bool:
        """Whether the memory holds `tensor` from `start` on; it is put there if that is allowed."""
        address, size = tensor.data_ptr(), ctypes.c_size_t(tensor.nbytes)
        if self._is_sealed:
            there = ctypes.c_void_p(self._address + start)
            if self._memcmp(there, ctypes.c_void_p(address), size) == 0:
                return True
            logger.warning("another core's packed weights are not these: the rest is not shared")
            self._size = 0
            return False
        source = memoryview((ctypes.c_char * tensor.nbytes).from_address(address))
        written = 0
        try:
            while written < tensor.nbytes:
                written += os.pwrite(self._file, source[written:], start + written)
        except OSError as error:  # no memory left of this kind
            logger.warning("not all packed weights can be shared: %s", error)
            self._size = start
            return False
        return True

    def seal(self) -> None:
        """Nothing more will come: let nobody change what is there."""
        if not self._is_sealed and self._mapping is not None:
            os.ftruncate(self._file, self._end)
            fcntl.fcntl(self._file, _F_ADD_SEALS, _ALL_SEALS)
            self._is_sealed = True
        logger.info("%d bytes of packed weights are shared", self._end)
