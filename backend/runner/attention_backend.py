"""The contract between a model's attention layers and whoever computes attention over pages.

A backend owns the layout of the KV cache, writing to it and attending over it. Scheduler and
block pool know block ids and nothing else; the model knows queries, keys and values. So a backend
may store a block in whatever order its kernel reads fastest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from footplate.backend.runner.batch import RaggedBatch

LayerCacheT = TypeVar("LayerCacheT")
StepT = TypeVar("StepT")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer caches per token. Keys and values may differ in size (DeepSeek-V2, 2024,
    multi-head latent attention, after its projection back to heads)."""

    num_kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Without any padding that a backend may add."""
        return self.num_kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How one layer attends.

    Attributes:
        scale: multiplies the product of query and key.
        window: a token sees itself and the `window - 1` tokens before it; None sees all
            (Mistral 7B, Jiang et al. 2023, section 2).
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, 2024, section 2).
        sinks: [num_heads], a score per head that takes part in the softmax and has no value
            (gpt-oss model card, 2025; after Xiao et al. 2024, "attention sinks").
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(Protocol[LayerCacheT, StepT]):
    """Paged attention (Kwon et al., SOSP '23, section 4.1) on one kind of device.

    Every token that was ever passed as key and value stays in the cache until its slot is
    written again. Writing the same tokens to the same slots twice is harmless.
    """

    @property
    def name(self) -> str:
        """For people: "torch", "cpu", "triton"."""
        ...

    def bytes_per_block(self, shape: LayerShape) -> int:
        """Bytes that one block of one layer takes in this backend's layout."""
        ...

    def allocate(self, shapes: Mapping[int, LayerShape], num_blocks: int) -> dict[int, LayerCacheT]:
        """Zeroed memory for some layers: a masked key still enters a product with zero, and zero
        times what happens to be in fresh memory may be NaN."""
        ...

    def begin_step(self, batch: RaggedBatch) -> StepT:
        """Prepare once per step what all layers share, for example index tensors."""
        ...

    def attend(
        self,
        step: StepT,
        cache: LayerCacheT,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write the new keys and values of the whole step, then attend causally over the cache.

        All writes come before any read: chunks of one sequence may stand in one batch.

        Args:
            query: [num_tokens, num_heads, key_size]; num_heads is a multiple of num_kv_heads,
                and query head h reads key head h // (num_heads / num_kv_heads).
            key: [num_tokens, num_kv_heads, key_size]. May be strided, as the others.
            value: [num_tokens, num_kv_heads, value_size].

        Returns:
            [num_tokens, num_heads, value_size], in the dtype of `query`.
        """
        ...
