"""The experts of a mixture, packed; see experts.h."""

from collections.abc import Sequence
from ctypes import c_void_p

import torch

from footplate.backend.kernels.linear import Move, PackedGatedMLP
from footplate.backend.kernels.ops import Kernels
from footplate.backend.kernels.words import TYPES, rows_of


class PackedExperts:
    """The experts of a mixture (Shazeer et al. 2017), each over the rows routed to it, in one call.

    Args:
        experts: of the same sizes and type; between their layers, whole words.
    """

    def __init__(self, kernels: Kernels, experts: Sequence[PackedGatedMLP]) -> None:
        first = experts[0]
        self.k, self.n, self.dtype = first.k, first.down.n, first.dtype
        assert first.hidden_size * self.dtype.itemsize % 4 == 0
        for expert in experts:
            assert (expert.k, expert.down.n, expert.dtype) == (self.k, self.n, self.dtype)
            assert expert.hidden_size == expert.down.k == first.hidden_size
        self._call = kernels._experts
        self._experts = list(experts)
        addresses = [address for e in experts for address in (e.address, e.down.address)]
        self._addresses = (c_void_p * len(addresses))(*addresses)

    def __len__(self) -> int:
        return len(self._experts)

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return sum(expert.nbytes for expert in self._experts)

    def move(self, move: Move) -> None:
        """See `PackedLinear.move`."""
        for expert in self._experts:
            expert.move(move)

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it, in the order of its slots.

        Args:
            x: [num_tokens, k].
            index: [num_tokens, top_k], int64; an expert per slot.
            weights: [num_tokens, top_k]; results are rounded to their type, and their sum to
                that of `x`.

        Returns:
            [num_tokens, n].

        Raises:
            IndexError: there is no such expert.
        """
        num_tokens, top_k = index.shape
        assert x.shape == (num_tokens, self.k) and x.dtype is self.dtype
        assert weights.shape == index.shape and index.dtype is torch.int64
        if weights.dtype is not self.dtype:
            weights = weights.float()
        x, stride = rows_of(x)
        index, weights = index.contiguous(), weights.contiguous()
        computed = torch.empty((num_tokens * top_k, self.n), dtype=self.dtype)
        y = torch.empty((num_tokens, self.n), dtype=self.dtype)
        if not self._call(
            *(TYPES[self.dtype], self._addresses, len(self._experts), x.data_ptr(), stride),
            *(index.data_ptr(), weights.data_ptr(), TYPES[weights.dtype]),
            *(computed.data_ptr(), y.data_ptr(), num_tokens, top_k),
        ):
            raise IndexError(f"there are experts 0 to {len(self._experts) - 1}")
        return y
