"""How much of a GPU's memory is left for the KV cache."""

from collections.abc import Mapping
from typing import Any

import torch

from footplate.backend.runner.attention_backend import AttentionBackend, LayerShape
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.sampler import Sampler
from footplate.backend.runner.warm_up import dummy_request


def free_bytes(device: torch.device, utilization: float) -> int:
    """What `utilization` (a fraction of all memory) leaves beside what is in use now."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * utilization) - (total - free))


def largest_step_bytes(
    model: Any,
    backend: AttentionBackend[Any, Any],
    shapes: Mapping[int, LayerShape],
    *,
    block_size: int,
    num_tokens: int,
    num_seqs: int,
    max_model_len: int,
) -> int:
    """Run the largest step there can be; return the most memory it held beside the KV cache.

    Every chunk of it stands at the end of the longest context. All layers share one cache:
    their results mean nothing, only their sizes count.
    """
    table = range(-(-max_model_len // block_size))
    chunks = []
    left = num_tokens
    while left:
        count = min(left, max_model_len)
        chunks.append(Chunk([0] * count, max_model_len - count, table))
        left -= count
    rows = list(range(min(num_seqs, num_tokens)))
    paged = PagedModel(model, _SharedCache(backend), len(table), shapes)
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_reserved(model.device)
    logits = paged.forward(RaggedBatch.of_chunks(chunks, rows, block_size))
    Sampler().sample(logits, [dummy_request(temperature=1.0)] * len(rows))
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_reserved(model.device) - before


class _SharedCache:
    """A backend whose layers of equal shape get the same cache."""

    def __init__(self, backend: AttentionBackend[Any, Any]) -> None:
        self._caches: dict[LayerShape, Any] = {}
        self._backend = backend
        self.name = backend.name
        self.bytes_per_block = backend.bytes_per_block
        self.begin_step = backend.begin_step
        self.attend = backend.attend

    def allocate(self, shapes: Mapping[int, LayerShape], num_blocks: int) -> dict[int, Any]:
        for shape in set(shapes.values()) - self._caches.keys():
            self._caches[shape] = self._backend.allocate({0: shape}, num_blocks)[0]
        return {layer: self._caches[shape] for layer, shape in shapes.items()}
