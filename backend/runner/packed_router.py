"""Routers of mixtures on our kernels: the product, and the rows that torch's functions see.

Every family chooses its experts in its own way, in its own code, which we leave to it. Only two
things in there depend on what else is in the batch, and each would change a request's logits:
the product with the router's matrix, and functions such as the sigmoid (see whole_vectors.py).
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from footplate.backend.kernels.linear import PackedLinear
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.recording import Call, relative_error
from footplate.backend.runner.whole_vectors import GRAIN, VECTOR


def looks_like_router(call: Call) -> bool:
    """Whether a module gave indices, a row of them per token, among others."""
    outputs = call.output if isinstance(call.output, tuple) else ()
    return any(
        isinstance(x, torch.Tensor) and x.dtype is torch.int64 and x.dim() == 2 for x in outputs
    )


def pack_router(kernels: Kernels, module: Any, call: Call, tolerance: float) -> bool:
    """Put our product under a router, and have it called with whole vectors of rows.

    What is compared are the products and not the choices, which may hang on a last bit.

    Returns:
        Whether it computes what it computed; if not, it is as it was.
    """
    # A router without one has a linear layer inside, which is replaced as such.
    weight = module._parameters.get("weight")
    has_matrix = weight is not None and weight.dim() == 2
    expected, got = _Products(), _Products()
    outputs: tuple[torch.Tensor, ...] = ()
    with suppress(Exception):  # any code of any architecture runs in there
        num_experts = max(x.shape[-1] for x in call.output)
        forward = _RowwiseRouter(module.forward, num_experts)
        with expected:
            forward(*call.args, **call.kwargs)
        if has_matrix:
            _set_weight(module, PackedWeight(kernels, weight))
        with got:
            outputs = forward(*call.args, **call.kwargs)
    products = zip(got.results, expected.results, strict=False)
    errors = [relative_error(a, b) for a, b in products] or [math.inf]
    if [x.shape for x in outputs] == [x.shape for x in call.output] and max(errors) <= tolerance:
        module.forward = forward
        return True
    if has_matrix:
        _set_weight(module, weight)
    return False


def _set_weight(module: Any, weight: "nn.Parameter | PackedWeight") -> None:
    del module.weight  # a parameter would give way to nothing but a parameter
    module.weight = weight


class PackedWeight:
    """A matrix as `F.linear` and a router's own code see it, and a packed linear layer inside.

    No tensor, but something that torch lets answer for one: whatever a router does with its weight
    beyond casting it and multiplying by it is an error, and so is noticed at load.

    Args:
        weight: [num_experts, hidden_size].
    """

    def __init__(self, kernels: Kernels, weight: torch.Tensor) -> None:
        self.dtype, self.shape, self.device = weight.dtype, weight.shape, weight.device
        self._kernels = kernels
        self._weight = weight.detach()
        self._in_type: dict[torch.dtype, PackedWeight] = {}
        self._packed: PackedLinear | None = None
        self._bias: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> "PackedWeight":
        """The same weight in another type; made once."""
        if dtype is self.dtype:
            return self
        if dtype not in self._in_type:
            self._in_type[dtype] = PackedWeight(self._kernels, self._weight.to(dtype))
        return self._in_type[dtype]

    type = to

    def float(self) -> "PackedWeight":
        """The same weight in float32."""
        return self.to(torch.float32)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See torch's documentation of the protocol."""
        if function is not functional.linear:
            return NotImplemented
        return _linear(*args, **(kwargs or {}))

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., hidden_size] to [..., num_experts]."""
        if self._packed is None or self._bias is not bias:
            self._packed = PackedLinear(self._kernels, self._weight, bias)
            self._bias = bias
        return self._packed(x)


def _linear(
    input: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return weight.multiply(input, bias)


class _RowwiseRouter:
    """Calls a router with rows whose elements fill whole vectors, on one thread.

    Args:
        forward: gives tensors with a row per token.
        num_experts: the longest of these rows.
    """

    def __init__(self, forward: Callable[..., tuple[torch.Tensor, ...]], num_experts: int) -> None:
        self._forward = forward
        self._max_rows = max(1, GRAIN // num_experts // VECTOR) * VECTOR

    def __call__(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        pieces = [
            self._whole(rows, args, kwargs)
            for rows in torch.split(hidden_states, self._max_rows, dim=-2)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _whole(
        self, rows: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        num_rows = rows.shape[-2]
        missing = -num_rows % VECTOR
        outputs = self._forward(functional.pad(rows, (0, 0, 0, missing)), *args, **kwargs)
        assert all(len(output) == num_rows + missing for output in outputs)
        return tuple(output[:num_rows] for output in outputs)


def apart(linear: PackedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """`linear`, of one output, with results that are no neighbours in memory: the sigmoid that
    such a gate goes through then takes them one by one, however many there are."""
    return lambda x: functional.pad(linear(x), (0, 1))[..., :1]


class _Products(TorchFunctionMode):
    """Keeps the results of all calls of `F.linear` while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[torch.Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See torch's documentation of the protocol."""
        result = function(*args, **(kwargs or {}))
        if function is functional.linear:
            self.results.append(result)
        return result
