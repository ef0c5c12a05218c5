"""Paged attention in plain torch: gather pages, then scaled dot product attention.

Runs wherever torch runs. It is the reference that other backends are held against, and what is
left when none of them fits the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from footplate.backend.kernels.large_memory import zeroed
from footplate.backend.runner.attention_backend import AttentionOptions, LayerShape
from footplate.backend.runner.batch import RaggedBatch
from footplate.backend.runner.torch_step import ChunkGroup, TorchStep


@dataclass(frozen=True, slots=True)
class TorchLayerCache:
    """One layer's pages, token-major: a page is one contiguous row, so that gathering pages is
    copying rows.

    Attributes:
        keys: [num_blocks, block_size, num_kv_heads, key_size].
        values: [num_blocks, block_size, num_kv_heads, value_size].
    """

    keys: torch.Tensor
    values: torch.Tensor


class TorchAttention:
    """An `AttentionBackend` for any device torch knows.

    Its results depend a little on what else is in the batch (the sums of a matrix product are
    split by its size): equal in fp32 up to rounding, not bit for bit.
    """

    name = "torch"

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self._scratch: dict[str, torch.Tensor] = {}

    def bytes_per_block(self, shape: LayerShape) -> int:
        """See `AttentionBackend`."""
        return shape.bytes_per_token * self._block_size

    def allocate(
        self, shapes: Mapping[int, LayerShape], num_blocks: int
    ) -> dict[int, TorchLayerCache]:
        """See `AttentionBackend`."""
        return {
            layer: TorchLayerCache(
                self._zeros(shape.dtype, num_blocks, shape.num_kv_heads, shape.key_size),
                self._zeros(shape.dtype, num_blocks, shape.num_kv_heads, shape.value_size),
            )
            for layer, shape in shapes.items()
        }

    def _zeros(self, dtype: torch.dtype, num_blocks: int, heads: int, size: int) -> torch.Tensor:
        shape = (num_blocks, self._block_size, heads, size)
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        return zeroed(shape, dtype)

    def begin_step(self, batch: RaggedBatch) -> TorchStep:
        """See `AttentionBackend`."""
        return TorchStep(batch, self._device)

    def attend(
        self,
        step: TorchStep,
        cache: TorchLayerCache,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        self._write(cache.keys, step.slots, key)
        self._write(cache.values, step.slots, value)
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        out = query.new_empty(query.shape[0], num_heads, value.shape[2])
        for group in step.groups(options.window):
            q = query[group.rows]
            q = q.reshape(group.num_chunks, group.num_queries, *q.shape[1:]).transpose(1, 2)
            if group.blocks is None:
                k, v = key[None, group.rows], value[None, group.rows]
            else:
                k = self._gather("keys", cache.keys, group)
                v = self._gather("values", cache.values, group)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            result = _attend_group(group, q, k, v, num_heads // num_kv_heads, options)
            out[group.rows] = result.transpose(1, 2).flatten(0, 1)
        return out

    @staticmethod
    def _write(pages: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
        # Whoever gets the page after this request hides what is left in it behind a mask, and a
        # mask does not hide what is not finite: zero times NaN is NaN. The request itself still
        # notices that it is broken, since its queries are not finite either.
        finite = new.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        pages.flatten(0, 1).index_copy_(0, slots, finite)

    def _gather(self, name: str, pages: torch.Tensor, group: ChunkGroup) -> torch.Tensor:
        """The group's keys or values, [num_chunks, num_keys, num_kv_heads, size]."""
        assert group.blocks is not None
        shape = (len(group.blocks), *pages.shape[1:])
        num_elements = len(group.blocks) * pages[0].numel()
        # One buffer for all layers and steps: fresh memory for every gather would cost up to ten
        # times the copy in page faults.
        buffer = self._scratch.get(name)
        if buffer is None or buffer.dtype != pages.dtype or len(buffer) < num_elements:
            buffer = self._scratch[name] = pages.new_empty(num_elements)
        gathered = buffer[:num_elements].view(shape)
        torch.index_select(pages, 0, group.blocks, out=gathered)
        tokens = gathered.view(group.num_chunks, -1, *pages.shape[2:])
        return tokens[:, group.skip : group.skip + group.num_keys]


def _attend_group(
    group: ChunkGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads_per_kv_head: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of one group.

    Args:
        query: [num_chunks, num_heads, num_queries, key_size].
        key, value: [num_chunks, num_kv_heads, num_keys, size].

    Returns:
        [num_chunks, num_heads, num_queries, value_size].
    """
    plain = options.softcap is None and options.sinks is None
    if plain and group.is_plain_causal:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.scale, enable_gqa=heads_per_kv_head > 1
        )
    # The query heads that read one key head become further queries of it: keys need no copy per
    # query head, and a lone query becomes a matrix.
    num_chunks, num_heads, num_queries, _ = query.shape
    folded = query.reshape(num_chunks, key.shape[1], heads_per_kv_head * num_queries, -1)
    mask = None if group.sees_all else group.mask()
    if mask is not None and num_queries > 1:
        mask = mask.repeat(1, 1, heads_per_kv_head, 1)
    if plain:
        result = _sdpa(folded, key, value, mask, options.scale)
    else:
        result = _softmax_attention(folded, key, value, mask, options, heads_per_kv_head)
    return result.reshape(num_chunks, num_heads, num_queries, -1)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    if query.shape[2] == 1 and query.dtype is torch.bfloat16 and query.device.type == "cpu":
        # Twice the same row: torch 2.13 computes a single bf16 row four times slower than two.
        twice = query.expand(-1, -1, 2, -1)
        out = scaled_dot_product_attention(twice, key, value, attn_mask=mask, scale=scale)
        return out[:, :, :1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    heads_per_kv_head: int,
) -> torch.Tensor:
    """What `scaled_dot_product_attention` cannot do: capped scores and attention sinks."""
    scores = torch.matmul(query, key.transpose(2, 3)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, heads_per_kv_head, 1)
        rows = sinks.repeat_interleave(query.shape[2] // heads_per_kv_head, dim=2)
        scores = torch.cat((scores, rows.expand(len(scores), -1, -1, -1)), dim=3)
    weights = torch.softmax(scores, dim=3)[..., : key.shape[2]]
    return torch.matmul(weights.to(value.dtype), value)
