"""The experts of a mixture on our kernels: each computes the rows that are routed to it.

transformers keeps the experts of a layer in two parameters of three dimensions and says in
attributes how they lie there. From these we know which numbers are whose; whether they are used
as in a gated MLP is found out by comparing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from footplate.backend.kernels.ops import (
    Activation,
    Kernels,
    PackedGatedMLP,
    PackedLinear,
    Quantization,
)
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
    return has_weights and getattr(module, "has_gate", False)


def activation_of(module: nn.Module, by_class: Mapping[str, Activation]) -> Activation | None:
    """What the experts of `module` seem to apply to their gate; None for what we do not have.

    Args:
        by_class: of modules that compute an activation, by the name of their class.
    """
    if _first_of(module, ALPHA_NAMES) is not None:
        return "swiglu_oai"
    return by_class.get(type(getattr(module, "act_fn", nn.SiLU())).__name__)


class PackedExperts:
    """Stands in for the `forward` of an experts module. Keeps nothing of its parameters.

    A token's result is the sum over its slots in their order, whichever tokens are beside it.

    Args:
        module: see `looks_like_experts`.
        quantization: of every expert, as in `PackedLinear`.
    """

    def __init__(
        self,
        kernels: Kernels,
        module: Any,
        activation: Activation,
        quantization: Quantization | None = None,
    ) -> None:
        self._experts = [
            _pack_expert(kernels, module, expert, activation, quantization)
            for expert in range(len(module.down_proj))
        ]

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What each token's experts make of it, weighted and summed.

        Args:
            hidden_states: [num_tokens, hidden_size].
            top_k_index: [num_tokens, top_k], int64; an expert per slot.
            top_k_weights: [num_tokens, top_k], of any floating type.

        Returns:
            [num_tokens, hidden_size], in the type of `hidden_states`.
        """
        num_tokens, top_k = top_k_index.shape
        experts, order = top_k_index.flatten().sort(stable=True)
        active, counts = torch.unique_consecutive(experts, return_counts=True)
        rows = torch.split(hidden_states[order // top_k], counts.tolist())
        by_expert = torch.cat(
            [self._experts[expert](x) for expert, x in zip(active.tolist(), rows, strict=True)]
        )
        by_slot = torch.empty_like(by_expert).index_copy_(0, order, by_expert)
        weighted = by_slot.view(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
        # One slot after another: `sum` may choose its order by the shape of the whole batch.
        total = weighted[:, 0].float()
        for slot in range(1, top_k):
            total += weighted[:, slot]
        return total.to(hidden_states.dtype)

    def matches(self, module: Any, call: Call, tolerance: float) -> bool:
        """Whether this computes what `module` computes: in the recorded call, and every expert by
        itself, because a recorded call need not have come to all of them."""
        if call.kwargs or [x.dim() for x in call.args] != [2, 2, 2]:
            return False
        if relative_error(self(*call.args), call.output) > tolerance:
            return False
        num_experts, rows = len(self._experts), call.args[0][:2]
        index = torch.arange(num_experts).repeat_interleave(len(rows))[:, None]
        weights = rows.new_ones(index.shape)
        for factor in (1.0, LOUD):
            x = (factor * rows).repeat(num_experts, 1)
            of_each = zip(
                torch.split(self(x, index, weights), len(rows)),
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
