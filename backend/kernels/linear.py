"""Linear layers and gated ones, packed for the micro-kernel; see linear.h and quantised.h.

Shapes and types of weights are checked here, once. A layer's address is that of a small C structure
which lives as long as the layer does.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_void_p
from typing import Literal

import torch

from footplate.backend.kernels.large_memory import zeroed
from footplate.backend.kernels.ops import Kernels
from footplate.backend.kernels.words import LANES, TYPES, dense, rows_of

# See `Format` and `Activation` in linear.h.
Quantization = Literal["int8", "int4"]
FORMATS: dict[Quantization | None, int] = {None: 0, "int8": 1, "int4": 2}
Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "swiglu_oai": 3}
Move = Callable[[torch.Tensor], torch.Tensor]


class PackedLinear:
    """A linear layer, y = x w^T + bias, packed for the micro-kernel.

    Keeps nothing of the tensors it is made from.

    Args:
        weights: [n, k] each, float32 or bfloat16; their outputs stand behind one another, as in a
            fused projection to queries, keys and values.
        biases: [n] each, all or none.
        quantization: "int8" keeps weights in 8 bits with one scale per output, "int4" in 4 bits
            with one scale per output and 128 inputs. Both round activations to 8 bits, each row
            for itself, or with "int4" each 128 numbers of a row.
        on_packed: called with each of `weights` when nothing more is wanted of it.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: torch.Tensor | Sequence[torch.Tensor],
        biases: torch.Tensor | Sequence[torch.Tensor] | None = None,
        quantization: Quantization | None = None,
        on_packed: Callable[[torch.Tensor], None] = lambda part: None,
    ) -> None:
        parts = [weights] if isinstance(weights, torch.Tensor) else list(weights)
        if any(len(part) % LANES for part in parts[:-1]):
            parts = [torch.cat(parts)]  # a group of lanes cannot belong to two matrices
        n, k, dtype = sum(len(part) for part in parts), parts[0].shape[1], parts[0].dtype
        num_groups = -(-n // LANES)
        packed = zeroed((num_groups, _group_words(k, dtype, quantization)), torch.int32)
        first_group = 0
        for part in parts:
            assert part.shape[1] == k and part.dtype is dtype
            _pack(kernels, part, packed, quantization, first_group, 1, 1)
            first_group += len(part) // LANES
            on_packed(part)
        self._kernels = kernels
        self._layer = _Layer(kernels, packed, biases, n, k, dtype, quantization)
        self.n, self.k, self.dtype = n, k, dtype
        self.address = self._layer.address

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return self._layer.packed.nbytes

    def move(self, move: Move) -> None:
        """Have the packed weights, int32, in the memory that `move` gives for them, which holds
        the same."""
        self._layer.move(move)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, wide: bool = False
    ) -> torch.Tensor:
        """[..., k] to [..., n].

        Args:
            residual: [..., n], contiguous, added to the rounded result.
            wide: give the result in float32, after rounding it as ever: for logits.
        """
        return self._layer(x, residual, wide)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [*ids.shape, k]: an embedding that shares the weights of a last
        layer needs no copy of its own.

        Args:
            ids: int64.

        Raises:
            IndexError: an id is negative, or not less than n.
        """
        assert ids.dtype is torch.int64
        ids = ids.contiguous()
        y = torch.empty((*ids.shape, self.k), dtype=self.dtype)
        layer = self._layer.address
        if not self._kernels._unpack_rows(layer, ids.data_ptr(), y.data_ptr(), ids.numel()):
            raise IndexError(f"a packed weight has rows 0 to {self.n - 1}")
        return y


class PackedGatedMLP:
    """A gated feed-forward layer, y = down(activation(gate(x)) * up(x)) (Shazeer 2020), in two
    calls.

    Args:
        gate, up: [n, k], with biases [n] or none.
        down: packed already.
        activation: "swiglu_oai" is (up + 1) * gate * sigmoid(alpha * gate), of gpt-oss.
        quantization: of gate and up, as in `PackedLinear`.
        limit: clamps gate from above and up on both sides.
    """

    def __init__(
        self,
        kernels: Kernels,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: PackedLinear,
        activation: Activation = "silu",
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        quantization: Quantization | None = None,
        limit: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        assert limit is None or limit > 0
        assert gate.shape == up.shape and gate.dtype is up.dtype is down.dtype
        assert (gate_bias is None) == (up_bias is None)
        n, k = gate.shape
        # Panels of two groups of each matrix; zeros where a matrix has no group left.
        num_groups = 4 * -(-n // (2 * LANES))
        packed = zeroed((num_groups, _group_words(k, gate.dtype, quantization)), torch.int32)
        _pack(kernels, gate, packed, quantization, 0, 2, 4)
        _pack(kernels, up, packed, quantization, 2, 2, 4)
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        self._layer = _Layer(
            kernels, packed, biases, n, k, gate.dtype, quantization, activation, limit, alpha
        )
        self.hidden_size, self.k, self.dtype = n, k, gate.dtype
        self.down = down
        self.address = self._layer.address

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return self._layer.packed.nbytes + self.down.nbytes

    def move(self, move: Move) -> None:
        """See `PackedLinear.move`."""
        self._layer.move(move)
        self.down.move(move)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., k] to [..., outputs of `down`]; `residual` is added as by `PackedLinear`."""
        return self.down(self._layer(x), residual)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """activation(gate(x)) * up(x): [..., k] to [..., hidden_size]."""
        return self._layer(x)


class _LinearLayer(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("type", c_int32),
        ("format", c_int32),
        ("activation", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
    )


class _Layer:
    """What linear layers and gated ones share: packed weights, and one call of the kernel."""

    def __init__(
        self,
        kernels: Kernels,
        packed: torch.Tensor,
        biases: torch.Tensor | Sequence[torch.Tensor] | None,
        n: int,
        k: int,
        dtype: torch.dtype,
        quantization: Quantization | None,
        activation: Activation | None = None,
        limit: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        self.packed = packed
        self.n, self.k, self.dtype = n, k, dtype
        self._call = kernels._linear
        self._bias = None
        if biases is not None:
            parts = [biases] if isinstance(biases, torch.Tensor) else list(biases)
            self._bias = torch.cat([part.detach() for part in parts])
            assert self._bias.shape == (n if activation is None else 2 * n,)
            assert self._bias.dtype is dtype
        self._struct = _LinearLayer(
            packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            n,
            k,
            TYPES[dtype],
            FORMATS[quantization],
            ACTIVATIONS[activation],
            limit or 0.0,
            alpha,
        )
        self.address = ctypes.addressof(self._struct)

    def move(self, move: Move) -> None:
        moved = move(self.packed)
        assert moved.shape == self.packed.shape and moved.is_contiguous()
        self.packed = moved
        self._struct.weights = moved.data_ptr()

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, wide: bool = False
    ) -> torch.Tensor:
        assert x.shape[-1] == self.k and x.dtype is self.dtype
        y = torch.empty((*x.shape[:-1], self.n), dtype=torch.float32 if wide else self.dtype)
        x, stride = rows_of(x)
        if residual is not None:
            assert residual.numel() == y.numel() and residual.is_contiguous()
            assert residual.dtype is self.dtype
        self._call(
            self.address,
            x.data_ptr(),
            stride,
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            wide,
            y.numel() // self.n,
        )
        return y


def _group_words(k: int, dtype: torch.dtype, quantization: Quantization | None) -> int:
    """32-bit words of a group of 16 packed columns; see linear.h and quantised.h."""
    if quantization == "int8":
        return (-(-k // 4) + 1) * LANES
    if quantization == "int4":
        return -(-k // 128) * 17 * LANES
    return -(-k // (4 // dtype.itemsize)) * LANES


def _pack(
    kernels: Kernels,
    weight: torch.Tensor,
    to: torch.Tensor,
    quantization: Quantization | None,
    first: int,
    run: int,
    stride: int,
) -> None:
    """Pack [n, k] into groups of `to`: from the `first` one, `run` of every `stride`."""
    weight = dense(weight.detach())
    n, k = weight.shape
    assert weight.dtype in TYPES, f"kernels know no {weight.dtype}"
    kernels._pack(
        *(TYPES[weight.dtype], FORMATS[quantization]),
        *(weight.data_ptr(), weight.stride(0), n, k),
        *(to.data_ptr(), first, run, stride),
    )
