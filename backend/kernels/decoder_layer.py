"""A decoder layer of the Llama family as one call of the kernels; see decoder_layer.h."""

import ctypes
from ctypes import c_float, c_int32, c_void_p

import torch

from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.linear import PackedGatedMLP, PackedLinear
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels


class _DecoderLayer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("scale", c_float),
        ("window", c_int32),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("output", c_void_p),
        ("mlp_norm", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
    )


class DecoderLayer:
    """norm, attention, residual, norm, gated MLP, residual. Keeps its parts alive.

    Args:
        qkv: [hidden_size] to queries, keys and values behind one another.
        query_norm, key_norm: of single heads.
        scale, window, softcap, sinks: see `Kernels.paged_attention`.
    """

    def __init__(
        self,
        kernels: Kernels,
        *,
        input_norm: NormWeight,
        qkv: PackedLinear,
        query_norm: NormWeight | None,
        key_norm: NormWeight | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        output: PackedLinear,
        mlp_norm: NormWeight,
        mlp: PackedGatedMLP,
    ) -> None:
        assert qkv.k == output.n == mlp.k == mlp.down.n == input_norm.size == mlp_norm.size
        assert self.supports(qkv.k) and self.supports(output.k) and self.supports(mlp.down.k)
        assert sinks is None or (sinks.dtype is torch.float32 and sinks.is_contiguous())
        self._call = kernels._decoder_layer
        self._parts = (input_norm, qkv, query_norm, key_norm, sinks, output, mlp_norm, mlp)
        self._hidden_size, self._qkv_size, self._output_size = qkv.k, qkv.n, output.k
        self._dtype = qkv.dtype
        self._num_sinks = None if sinks is None else sinks.numel()
        self._struct = _DecoderLayer(
            input_norm.address,
            qkv.address,
            None if query_norm is None else query_norm.address,
            None if key_norm is None else key_norm.address,
            scale,
            window or 0,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            output.address,
            mlp_norm.address,
            mlp.address,
            mlp.down.address,
        )
        self._address = ctypes.addressof(self._struct)

    @staticmethod
    def supports(row_size: int) -> bool:
        """Whether rows of activations of this size are whole words in every type."""
        return row_size % 2 == 0

    def __call__(
        self,
        cache: LayerPages,
        step: StepTables,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """[..., num_tokens, hidden_size] to the same.

        Args:
            cos, sin: see `Kernels.rope_and_cache`.
        """
        num_tokens, rotary_size = step.num_tokens, cos.shape[-1]
        num_heads = (self._qkv_size - cache.row_size(0)) // cache.key_size
        assert cache.row_size(num_heads) == self._qkv_size
        assert num_heads * cache.value_size == self._output_size
        assert num_heads % cache.num_kv_heads == 0 and rotary_size <= cache.key_size
        assert self._num_sinks in (None, num_heads)
        assert hidden.numel() == num_tokens * self._hidden_size and hidden.is_contiguous()
        assert cos.numel() == sin.numel() == num_tokens * rotary_size
        assert cos.is_contiguous() and sin.is_contiguous()
        assert hidden.dtype is cos.dtype is sin.dtype is cache.dtype is self._dtype
        y = torch.empty_like(hidden)
        self._call(
            self._address,
            cache.address,
            step.address,
            hidden.data_ptr(),
            y.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rotary_size,
        )
        return y
