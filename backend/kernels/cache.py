"""The paged cache of one layer, and where the tokens of a step belong in it; see cache.h."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch

from footplate.backend.kernels.large_memory import zeroed
from footplate.backend.kernels.words import LANES, TYPES

PAGE_TOKENS = 16


class _LayerCache(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("page_stride", c_int64),
        ("num_kv_heads", c_int32),
        ("key_size", c_int32),
        ("value_size", c_int32),
        ("type", c_int32),
    )


class _StepTables(ctypes.Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("num_tokens", c_int32),
        ("num_requests", c_int32),
        ("table_stride", c_int32),
        ("pages_per_block", c_int32),
    )


class LayerPages:
    """The cache of one layer, whose layout is told in cache.h.

    Args:
        block_size: tokens in a block as the block pool counts them, a multiple of 16.
        memory: [num_blocks * block_size / 16, page_words], zeroed int32, rows anywhere; by
            default the layer has memory of its own.

    Attributes:
        keys: [num_pages, num_kv_heads, key_words, 16, values per word], a view.
        values: [num_pages, num_kv_heads, 16 / values per word, value_columns, values per word].
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        key_size: int,
        value_size: int,
        dtype: torch.dtype,
        memory: torch.Tensor | None = None,
    ) -> None:
        assert block_size % PAGE_TOKENS == 0
        self.num_kv_heads, self.key_size, self.value_size = num_kv_heads, key_size, value_size
        self.dtype = dtype
        shape = (
            num_blocks * (block_size // PAGE_TOKENS),
            self.page_words(num_kv_heads, key_size, value_size, dtype),
        )
        memory = zeroed(shape, torch.int32) if memory is None else memory
        assert memory.shape == shape and memory.stride(1) == 1 and memory.dtype is torch.int32
        values_per_word, key_words, value_columns = _page_layout(key_size, value_size, dtype)
        num_key_words = num_kv_heads * key_words * PAGE_TOKENS
        keys, values = memory[:, :num_key_words], memory[:, num_key_words:]
        keys = torch.unflatten(keys, 1, (num_kv_heads, key_words, PAGE_TOKENS, 1))
        values = torch.unflatten(
            values, 1, (num_kv_heads, PAGE_TOKENS // values_per_word, value_columns, 1)
        )
        self.keys, self.values = keys.view(dtype), values.view(dtype)
        self._cache = _LayerCache(
            self.keys.data_ptr(),
            self.values.data_ptr(),
            memory.stride(0),
            num_kv_heads,
            key_size,
            value_size,
            TYPES[dtype],
        )
        self.address = ctypes.addressof(self._cache)

    @staticmethod
    def page_words(num_kv_heads: int, key_size: int, value_size: int, dtype: torch.dtype) -> int:
        """32-bit words of the keys and values of 16 tokens, padding included."""
        values_per_word, key_words, value_columns = _page_layout(key_size, value_size, dtype)
        words_per_head = PAGE_TOKENS * key_words + PAGE_TOKENS // values_per_word * value_columns
        return num_kv_heads * words_per_head

    def row_size(self, num_heads: int) -> int:
        """Numbers per token of a fused projection to queries, keys and values."""
        return (num_heads + self.num_kv_heads) * self.key_size + self.num_kv_heads * self.value_size


class StepTables:
    """Where the tokens of one step belong; made once per step, for all layers.

    Args:
        slots: [num_tokens], int64, block id times block size plus offset.
        query_starts: [num_requests + 1], int32, first row of each request.
        context_lens: [num_requests], int32, tokens in the cache after this step.
        block_tables: [num_requests, any], int32, block ids, padded with anything.
        block_size: as in `LayerPages`.
    """

    def __init__(
        self,
        slots: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> None:
        tensors = (slots, query_starts, context_lens, block_tables)
        assert [t.dtype for t in tensors] == [torch.int64, *3 * [torch.int32]]
        assert all(t.is_contiguous() for t in tensors)
        assert len(query_starts) - 1 == len(context_lens) == len(block_tables)
        self.num_tokens = len(slots)
        self._tensors = tensors  # kept alive: the structure has their addresses
        self._tables = _StepTables(
            *(t.data_ptr() for t in tensors),
            self.num_tokens,
            len(context_lens),
            block_tables.shape[1],
            block_size // PAGE_TOKENS,
        )
        self.address = ctypes.addressof(self._tables)


def _page_layout(key_size: int, value_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    values_per_word = 4 // dtype.itemsize
    return values_per_word, -(-key_size // values_per_word), -(-value_size // LANES) * LANES
