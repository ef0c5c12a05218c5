"""Footplate's own CPU kernels: packed linear layers, norms, paged attention.

`load` compiles them on first use and gives None where that is not possible; `Kernels` makes typed
functions of what it loaded.
"""

from footplate.backend.kernels.build import cache_folder, load
from footplate.backend.kernels.ops import (
    Kernels,
    LayerPages,
    NormWeight,
    PackedGatedMLP,
    PackedLinear,
    Quantization,
    StepTables,
)

__all__ = [
    "Kernels",
    "LayerPages",
    "NormWeight",
    "PackedGatedMLP",
    "PackedLinear",
    "Quantization",
    "StepTables",
    "cache_folder",
    "load",
]
