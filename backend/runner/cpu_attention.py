"""Paged attention on the CPU by our own kernels.

The results of a sequence do not depend on what else is in the batch, on how its prompt was cut
into chunks, or on the number of threads: bit for bit. See `footplate.backend.kernels`.
"""

from collections.abc import Mapping
from itertools import accumulate, chain, pairwise, repeat

import numpy as np
import torch

from footplate.backend.kernels.cache import PAGE_TOKENS, LayerPages, StepTables
from footplate.backend.kernels.large_memory import zeroed
from footplate.backend.kernels.ops import Kernels
from footplate.backend.kernels.touched_memory import TouchedMemory
from footplate.backend.runner.attention_backend import AttentionOptions, LayerShape
from footplate.backend.runner.batch import RaggedBatch

WORD_BYTES = 4


class CpuAttention:
    """An `AttentionBackend` over `Kernels`. A block is one or more pages of 16 tokens, in the
    layout that the micro-kernel reads.

    Args:
        touched: for the first layers that are allocated.
    """

    def __init__(
        self, kernels: Kernels, block_size: int, touched: TouchedMemory | None = None
    ) -> None:
        assert self.supports(block_size)
        self.name = f"cpu {kernels.instruction_set}"
        self._kernels = kernels
        self._block_size = block_size
        self._touched = touched

    @staticmethod
    def supports(block_size: int) -> bool:
        """Whether blocks of this many tokens are whole pages."""
        return block_size % PAGE_TOKENS == 0

    def bytes_per_block(self, shape: LayerShape) -> int:
        """See `AttentionBackend`."""
        return _page_words(shape) * WORD_BYTES * (self._block_size // PAGE_TOKENS)

    def allocate(self, shapes: Mapping[int, LayerShape], num_blocks: int) -> dict[int, LayerPages]:
        """See `AttentionBackend`."""
        ends = list(accumulate(map(_page_words, shapes.values()), initial=0))
        num_pages = num_blocks * (self._block_size // PAGE_TOKENS)
        memory = zeroed((num_pages, ends[-1]), torch.int32, self._touched)
        return {
            layer: LayerPages(
                num_blocks,
                self._block_size,
                shape.num_kv_heads,
                shape.key_size,
                shape.value_size,
                shape.dtype,
                memory[:, start:end],
            )
            for (layer, shape), (start, end) in zip(shapes.items(), pairwise(ends), strict=True)
        }

    def begin_step(self, batch: RaggedBatch) -> StepTables:
        """See `AttentionBackend`."""
        tables = [chunk.block_ids for chunk in batch.chunks]
        width = max(map(len, tables))
        padded = chain.from_iterable(chain(ids, repeat(0, width - len(ids))) for ids in tables)
        flat = np.fromiter(padded, np.int32, width * len(tables))
        starts = np.array(batch.query_starts, dtype=np.int32)
        lens = [chunk.start + len(chunk.token_ids) for chunk in batch.chunks]
        return StepTables(
            torch.from_numpy(batch.slots),
            torch.from_numpy(starts),
            torch.tensor(lens, dtype=torch.int32),
            torch.from_numpy(flat).view(len(tables), width),
            self._block_size,
        )

    def attend(
        self,
        step: StepTables,
        cache: LayerPages,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        self._kernels.write_kv(cache, step, key, value)
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        return self._kernels.paged_attention(
            cache, step, query, options.scale, options.window, options.softcap, sinks
        )


def _page_words(shape: LayerShape) -> int:
    return LayerPages.page_words(shape.num_kv_heads, shape.key_size, shape.value_size, shape.dtype)
