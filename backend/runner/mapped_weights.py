"""Gives back the memory of weights that were read from a mapped file.

A checkpoint is mapped, not read: its pages take memory from the moment they are first touched
until the whole file is unmapped, and a few small tensors keep it mapped for ever. Pages that are
given back are clean copies of the file. Touched again they come back from it.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

_MADV_DONTNEED = 4  # Linux, on every architecture


class MappedWeights:
    """Knows at which addresses of this process the weight files of a model are.

    Elsewhere than on Linux it knows of none, and gives nothing back.

    Args:
        folder: of the model; its files may be links.
    """

    def __init__(self, folder: Path) -> None:
        files = tuple(f" {file.resolve()}" for file in folder.glob("*.safetensors"))
        self._ranges: list[tuple[int, int]] = []
        with suppress(OSError), open("/proc/self/maps") as maps:
            for line in maps:
                if files and line.rstrip().endswith(files):
                    start, end = line.split(None, 1)[0].split("-")
                    self._ranges.append((int(start, 16), int(end, 16)))
        self._madvise = ctypes.CDLL(None).madvise if self._ranges else None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all of `tensor` is a file's."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(low <= start and end <= high for low, high in self._ranges)

    def release(self, tensor: torch.Tensor) -> None:
        """Give back the whole pages of `tensor`, if they are a file's.

        Its numbers stay what they are, at the price of reading them again.
        """
        if self._madvise is None or not tensor.is_contiguous():
            return
        page = mmap.PAGESIZE
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-start // page) * page, end // page * page
        # Only what nobody has written to comes back, and inference does not write to weights.
        if first < last and any(low <= first and last <= high for low, high in self._ranges):
            self._madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)

    @contextmanager
    def released_after_use(self, model: nn.Module) -> Iterator[None]:
        """Each module that is called within the context gives its own weights back afterwards."""

        def release(module: nn.Module, args: object, output: object) -> None:
            for weight in module.parameters(recurse=False):
                self.release(weight)

        hooks = [module.register_forward_hook(release) for module in model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
