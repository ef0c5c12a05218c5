"""The weights of norms; see norm.h."""

import ctypes
from ctypes import c_float, c_int32, c_void_p

import torch

from footplate.backend.kernels.words import TYPES


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("epsilon", c_float),
        ("weight_offset", c_float),
        ("rounds_before_weight", c_int32),
    )


class NormWeight:
    """The weight of an RMSNorm, and how its family rounds: Llama as by default; Gemma with
    `offset` 1 and one rounding at the end; OLMo 2 with one rounding at the end."""

    def __init__(
        self,
        weight: torch.Tensor,
        epsilon: float,
        offset: float = 0.0,
        rounds_before_weight: bool = True,
    ) -> None:
        self.weight = weight.detach().contiguous()
        self.size = self.weight.numel()
        self.dtype = weight.dtype
        self.type = TYPES[weight.dtype]
        self._norm = _Norm(self.weight.data_ptr(), epsilon, offset, rounds_before_weight)
        self.address = ctypes.addressof(self._norm)
