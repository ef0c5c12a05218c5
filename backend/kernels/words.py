"""How tensors reach the kernels: types by number, rows of whole words; see words.h."""

import torch

LANES = 16

# See `Type` in words.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it, with nothing between the numbers of its last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x`, or a copy of it, as rows at equal distances of whole words, and that distance in
    numbers. Rows that do not fill their last word are filled up with zero."""
    values_per_word = 4 // x.itemsize
    if rest := x.shape[-1] % values_per_word:
        x = torch.nn.functional.pad(x, (0, values_per_word - rest))
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % values_per_word == 0:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]
