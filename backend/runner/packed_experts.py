"""The experts of a mixture on our kernels: each computes the rows that are routed to it.

transformers keeps the experts of a layer in two parameters of three dimensions and says in
attributes how they lie there. From these we know which numbers are whose; whether they are used
as in a gated MLP is found out by comparing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from footplate.backend.kernels.experts import PackedExperts
from footplate.backend.kernels.linear import Activation, PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.ops import Kernels
from footplate.backend.kernels.words import TYPES
from footplate.backend.runner.recording import Call, relative_error

WEIGHTS = ("gate_up_proj", "down_proj")

# Some families clamp what stands between the two matrices, at 7 or 10: nothing that an ordinary
# input would show. A factor that takes any activation far beyond.
LOUD = 256.0

# What families call the bound of that clamp, and the factor of "swiglu_oai".
LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")


def looks_like_experts(module: nn.Module) -> bool:
    """Whether `module` has gated experts in parameters whose layout it declares."""
    weights = [getattr(module, name, None) for name in WEIGHTS]
    has_weights = all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights)
    if not has_weights or not getattr(module, "has_gate", False):
        return False
    down = module.get_parameter("down_proj")
    size = down.shape[1 if getattr(module, "is_transposed", False) else 2]
    # Between their layers, the kernels need whole words.
    return down.dtype in TYPES and size * down.itemsize % 4 == 0


def activation_of(module: nn.Module, by_class: Mapping[str, Activation]) -> Activation | None:
    """What the experts of `module` seem to apply to their gate; None for what we do not have.

    Args:
        by_class: of modules that compute an activation, by the name of their class.
    """
    if _first_of(module, ALPHA_NAMES) is not None:
        return "swiglu_oai"
    return by_class.get(type(getattr(module, "act_fn", nn.SiLU())).__name__)


def pack_experts(
    kernels: Kernels,
    module: Any,
    activation: Activation,
    quantization: Quantization | None = None,
) -> PackedExperts:
    """What may stand in for the `forward` of `module`; keeps nothing of its parameters.

    Args:
        module: see `looks_like_experts`.
        quantization: of every expert, as in `PackedLinear`.
    """
    experts = range(len(module.down_proj))
    return PackedExperts(
        kernels, [_pack_expert(kernels, module, i, activation, quantization) for i in experts]
    )


def experts_match(packed: PackedExperts, module: Any, call: Call, tolerance: float) -> bool:
    """Whether `packed` computes what `module` computes: in the recorded call, and every expert by
    itself, because a recorded call need not have come to all of them."""
    if call.kwargs or len(call.args) != 3:
        return False
    hidden_states, top_k_index, top_k_weights = call.args
    if hidden_states.dim() != 2 or hidden_states.dtype is not packed.dtype:
        return False
    if top_k_index.dtype is not torch.int64 or top_k_weights.shape != top_k_index.shape:
        return False
    if relative_error(packed(*call.args), call.output) > tolerance:
        return False
    rows = hidden_states[:2]
    index = torch.arange(len(packed)).repeat_interleave(len(rows))[:, None]
    weights = rows.new_ones(index.shape)
    for factor in (1.0, LOUD):
        x = (factor * rows).repeat(len(packed), 1)
        of_each = zip(
            torch.split(packed(x, index, weights), len(rows)),
            torch.split(module(x, index, weights), len(rows)),
            strict=True,
        )
        if any(relative_error(got, expected) > tolerance for got, expected in of_each):
            return False
    return True


def drop_weights(module: nn.Module) -> None:
    """Release the parameters of an experts module that has been packed."""
    for name, parameter in module.named_parameters(recurse=False):
        empty = nn.Parameter(parameter.new_empty(0), requires_grad=False)
        setattr(module, name, empty)


def _pack_expert(
    kernels: Kernels,
    module: Any,
    expert: int,
    activation: Activation,
    quantization: Quantization | None,
) -> PackedGatedMLP:
    gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
    if module.is_transposed:
        gate_up, down = gate_up.T, down.T
    gate_up_bias = down_bias = None
    if module.has_bias:
        gate_up_bias, down_bias = module.gate_up_proj_bias[expert], module.down_proj_bias[expert]

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middle = len(x) // 2
        return (x[:middle], x[middle:]) if module.is_concatenated else (x[::2], x[1::2])

    gate, up = halves(gate_up)
    gate_bias, up_bias = (None, None) if gate_up_bias is None else halves(gate_up_bias)
    return PackedGatedMLP(
        kernels,
        gate,
        up,
        PackedLinear(kernels, down, down_bias, quantization),
        activation,
        gate_bias,
        up_bias,
        quantization,
        limit=_first_of(module, LIMIT_NAMES),
        alpha=_first_of(module, ALPHA_NAMES) or 1.0,
    )


def _first_of(module: nn.Module, names: tuple[str, ...]) -> float | None:
    """The first of these attributes that is a number."""
    values = [getattr(module, name, None) for name in names]
    return next((value for value in values if isinstance(value, (int, float))), None)
