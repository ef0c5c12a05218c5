"""The forward of a model whose every part is ours, without what transformers puts around them.

Decorators, mask creation and output classes cost a third of a millisecond per step, a tenth of
what a small quantised model computes in that time. As with single modules, what a model looks like
only suggests that it can do without; the logits of a recorded batch, equal to the last bit, decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from footplate.backend.kernels.linear import PackedLinear
from footplate.backend.runner.fused_layer import FusedLayer

Positions = tuple[torch.Tensor, torch.Tensor]

# Frequencies that are the same for every length of a sequence; those of "dynamic" and "longrope"
# change with it.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
PIECE = 4096  # positions


class RotaryTable:
    """Cosines and sines of all positions so far, from the model's own rotary module.

    Each position's row is computed by itself, so a table holds the same bits. It grows as
    sequences do, a little ahead of them.
    """

    def __init__(self, rotary: nn.Module, like: torch.Tensor) -> None:
        self._rotary = rotary
        self._like = like
        self._cos, self._sin = self._rows(0, PIECE)

    def __call__(self, positions: torch.Tensor) -> Positions:
        """Cosines and sines of `positions`, [num_tokens, rotary_size] each.

        Args:
            positions: [num_tokens], int64.
        """
        longest = int(positions.max())
        while longest >= len(self._cos):
            cos, sin = self._rows(len(self._cos), PIECE)
            self._cos, self._sin = torch.cat([self._cos, cos]), torch.cat([self._sin, sin])
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _rows(self, first: int, count: int) -> Positions:
        positions = torch.arange(first, first + count)[None]
        cos, sin = self._rotary(self._like, position_ids=positions)
        return cos[0].contiguous(), sin[0].contiguous()


@dataclass(frozen=True, slots=True)
class DirectForward:
    """Embedding, layers, norm, last layer: nothing else."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    rotary: RotaryTable
    layers: Sequence[FusedLayer]
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: PackedLinear

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """[num_tokens] ids and positions to logits of `rows`, [num_rows, vocab], float32."""
        hidden = self.embed(token_ids)
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=(cos, sin))
        return self.head(self.norm(hidden.index_select(0, rows)), wide=True)


def direct_forward_of(model: Any, head: PackedLinear | None) -> DirectForward | None:
    """The direct forward of a rewritten model, if it looks as if it had one.

    Args:
        head: what was put in the place of its last layer.
    """
    base = model.base_model
    if {name for name, _ in base.named_children()} != {
        "embed_tokens",
        "layers",
        "norm",
        "rotary_emb",
    }:
        return None
    layers = [layer.forward for layer in base.layers]
    rope_type = getattr(base.rotary_emb, "rope_type", None)
    is_known = all(isinstance(layer, FusedLayer) for layer in layers)
    if head is None or not is_known:
        return None
    if not isinstance(rope_type, str) or rope_type not in FIXED_ROPE_TYPES:
        return None
    like = torch.empty(0, dtype=model.dtype)
    return DirectForward(
        base.embed_tokens, RotaryTable(base.rotary_emb, like), layers, base.norm, head
    )
