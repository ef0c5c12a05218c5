"""One step as a flattened, ragged batch: the tokens of all requests behind one another.

Built on the host from Python and NumPy values only, so that nothing later has to ask the device
how long a request is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from footplate.backend.step import StepPlan

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that are computed in this step.

    Attributes:
        token_ids: the new tokens.
        start: the position of the first of them; everything before it is in the cache.
        block_ids: the sequence's block table; covers the new tokens too.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Chunks, flattened.

    Attributes:
        chunks: in the order in which they stand in the batch.
        query_starts: [num_chunks + 1], where each chunk begins in the flattened batch.
        token_ids: [num_tokens], int64.
        positions: [num_tokens], int64, position of each token in its own sequence.
        slots: [num_tokens], int64, where each token's key and value go: block id times block
            size plus offset.
        logit_rows: rows of the flattened batch whose logits are wanted, int64.
    """

    chunks: Sequence[Chunk]
    query_starts: list[int]
    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    logit_rows: IntArray
    block_size: int

    @classmethod
    def of_chunks(
        cls, chunks: Sequence[Chunk], logit_rows: Sequence[int], block_size: int
    ) -> "RaggedBatch":
        """Flatten `chunks`; there is at least one, and none of them is empty."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        for chunk in chunks:
            start, end = chunk.start, chunk.start + len(chunk.token_ids)
            token_ids += chunk.token_ids
            positions += range(start, end)
            query_starts.append(len(token_ids))
            if end - start == 1:  # a decode; NumPy would cost more than it does
                block = chunk.block_ids[start // block_size]
                slots.append(block * block_size + start % block_size)
            else:
                slots += _slots(chunk.block_ids, start, end, block_size)
        return cls(
            chunks=chunks,
            query_starts=query_starts,
            token_ids=np.asarray(token_ids),
            positions=np.asarray(positions),
            slots=np.asarray(slots),
            logit_rows=np.asarray(logit_rows, dtype=np.int64),
            block_size=block_size,
        )

    @classmethod
    def of_plan(
        cls, plan: StepPlan, block_size: int, scored: Mapping[int, range] | None = None
    ) -> "RaggedBatch":
        """The batch of a step: each request's new tokens, and the last row of each that is to be
        sampled.

        Args:
            scored: by index into `plan.requests`: positions of prompt tokens. The rows of the
                tokens before them are wanted too, behind those that are to be sampled.
        """
        chunks = []
        for request, count in zip(plan.requests, plan.num_new_tokens, strict=True):
            start = request.num_computed_tokens
            new = request.token_ids[start : start + count]
            chunks.append(Chunk(new, start, request.block_ids))
        ends = np.cumsum(plan.num_new_tokens)
        rows = [int(ends[i]) - 1 for i in plan.sampling]
        for index, positions in (scored or {}).items():
            chunk = chunks[index]
            first = int(ends[index]) - len(chunk.token_ids) - chunk.start - 1
            rows += range(first + positions.start, first + positions.stop)
        return cls.of_chunks(chunks, rows, block_size)


def _slots(block_ids: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    block, offset = np.divmod(np.arange(start, end), block_size)
    first = start // block_size
    blocks = np.asarray(block_ids[first : (end - 1) // block_size + 1])
    slots: list[int] = (blocks[block - first] * block_size + offset).tolist()
    return slots


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Copy a host array to `device` without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
