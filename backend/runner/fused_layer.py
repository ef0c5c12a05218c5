"""A decoder layer of the Llama family as one kernel call.

The structure that most architectures share (Llama, Mistral, Qwen 2 and 3, SmolLM 3, ...): norm,
attention, residual, norm, gated MLP, residual. What a layer looks like only suggests that it is
one of them; whoever builds one compares its output with the original's before using it.
"""

import torch
from torch import nn

from footplate.backend.kernels.decoder_layer import DecoderLayer
from footplate.backend.kernels.linear import Move, PackedGatedMLP, PackedLinear
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.attention_backend import AttentionOptions
from footplate.backend.runner.paged_model import running_layer

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def looks_fusible(layer: nn.Module) -> bool:
    """Whether `layer` has the parts, and no others, that a fused layer computes with."""
    if {name for name, _ in layer.named_children()} != set(PARTS):
        return False
    attention = layer.get_submodule("self_attn")
    children = {name for name, child in attention.named_children() if _has_state(child)}
    projections_are_linear = all(
        type(getattr(attention, name, None)) is nn.Linear for name in PROJECTIONS
    )
    return projections_are_linear and children - set(PROJECTIONS) <= {"q_norm", "k_norm"}


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


class FusedLayer:
    """Stands in for the `forward` of a decoder layer. Owns its packed weights.

    Args:
        options: how the original attends, as it told the attention function.
        qkv: [hidden_size] to queries, keys and values behind one another.
        query_norm, key_norm: of single heads.
    """

    def __init__(
        self,
        kernels: Kernels,
        layer_idx: int,
        options: AttentionOptions,
        *,
        input_norm: NormWeight,
        qkv: PackedLinear,
        query_norm: NormWeight | None,
        key_norm: NormWeight | None,
        output: PackedLinear,
        mlp_norm: NormWeight,
        mlp: PackedGatedMLP,
    ) -> None:
        self.mlp = mlp
        self._kernels = kernels
        self._layer_idx = layer_idx
        self._options = options
        self._qkv = qkv
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._output = output
        self._sinks = None if options.sinks is None else options.sinks.float().contiguous()
        self._layer = DecoderLayer(
            kernels,
            input_norm=input_norm,
            qkv=qkv,
            query_norm=query_norm,
            key_norm=key_norm,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=self._sinks,
            output=output,
            mlp_norm=mlp_norm,
            mlp=mlp,
        )

    def move(self, move: Move) -> None:
        """See `PackedLinear.move`."""
        for packed in (self._qkv, self._output, self.mlp):
            packed.move(move)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: object,
    ) -> torch.Tensor:
        """[1, num_tokens, hidden_size] to the same; `position_embeddings` are cosines and sines,
        [1, num_tokens, rotary_size] each."""
        step, cache = running_layer(self._layer_idx)
        cos, sin = position_embeddings
        return self._layer(cache, step, hidden_states, cos.contiguous(), sin.contiguous())

    def attend(
        self, normed: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The attention block by itself, without norm and residual: for comparing at load."""
        kernels, options = self._kernels, self._options
        step, cache = running_layer(self._layer_idx)
        cos, sin = position_embeddings
        qkv = self._qkv(normed)[0]
        num_heads = (self._qkv.n - cache.row_size(0)) // cache.key_size
        kernels.rope_and_cache(
            cache,
            step,
            qkv,
            num_heads,
            cos.contiguous(),
            sin.contiguous(),
            self._query_norm,
            self._key_norm,
        )
        queries = qkv[:, : num_heads * cache.key_size].view(-1, num_heads, cache.key_size)
        attended = kernels.paged_attention(
            cache, step, queries, options.scale, options.window, options.softcap, self._sinks
        )
        return self._output(attended.flatten(1)[None])
