"""How the torch backend cuts one step into calls: which chunks are attended together, over which
pages, and what is hidden from whom."""

from dataclasses import dataclass, field

import numpy as np
import torch

from footplate.backend.runner.batch import IntArray, RaggedBatch, to_device

# Keys of one group, padding included. On a CPU what was gathered should still be in its caches
# when it is read again: 2,048 beat 16,384 by 1.3 to 2.1 times for contexts of 192 to 2,048 tokens.
# A GPU wants few, large calls.
MAX_GATHERED_TOKENS = {"cpu": 2048, "cuda": 65_536}


@dataclass(slots=True)
class ChunkGroup:
    """Chunks of equal length that are attended in one call.

    Attributes:
        rows: where their queries stand in the flattened batch, chunk by chunk.
        query_positions: [num_chunks, num_queries].
        key_starts: [num_chunks], position of the first gathered key of each chunk.
        num_keys: keys per chunk; behind the shorter contexts of a group stand keys of positions
            that no query of theirs can see.
        skip: gathered keys before the first one that is used.
        blocks: pages to gather, [num_chunks * pages per chunk]; None when the keys of this very
            step are all there are, so that nothing needs to be gathered.
    """

    rows: slice | torch.Tensor
    query_positions: IntArray
    key_starts: IntArray
    num_keys: int
    skip: int
    blocks: torch.Tensor | None
    window: int | None
    device: torch.device
    _mask: torch.Tensor | None = field(default=None, init=False)

    @property
    def num_chunks(self) -> int:
        """Chunks in the group."""
        return len(self.query_positions)

    @property
    def num_queries(self) -> int:
        """New tokens of each chunk."""
        return len(self.query_positions[0])

    @property
    def is_plain_causal(self) -> bool:
        """Whether key i is visible to exactly the queries from i on."""
        fits = self.window is None or self.num_queries <= self.window
        return self.blocks is None and fits

    @property
    def sees_all(self) -> bool:
        """Whether no key has to be hidden from any query."""
        return self.num_chunks == 1 and self.num_queries == 1

    def mask(self) -> torch.Tensor:
        """[num_chunks, 1, num_queries, num_keys], bool, True where the query sees the key."""
        if self._mask is None:
            query = to_device(self.query_positions, self.device)[:, None, :, None]
            start = to_device(self.key_starts, self.device)[:, None, None, None]
            key = start + torch.arange(self.num_keys, device=self.device)
            visible = key <= query
            if self.window is not None:
                visible &= key > query - self.window
            self._mask = visible
        return self._mask


class TorchStep:
    """What all layers of one step share. Layers differ in their window, so groups are made per
    window, when the first layer with it asks."""

    def __init__(self, batch: RaggedBatch, device: torch.device) -> None:
        self._batch = batch
        self._device = device
        self._groups: dict[int | None, list[ChunkGroup]] = {}
        self.slots = to_device(batch.slots, device)

    def groups(self, window: int | None) -> list[ChunkGroup]:
        """All chunks of the step, grouped for layers with this window."""
        if window not in self._groups:
            self._groups[window] = self._make_groups(window)
        return self._groups[window]

    def _make_groups(self, window: int | None) -> list[ChunkGroup]:
        chunks, size = self._batch.chunks, self._batch.block_size
        pages = []  # of each chunk's block table: from the first key that any of its queries sees
        for chunk in chunks:
            first_key = 0 if window is None else max(0, chunk.start - window + 1)
            end = chunk.start + len(chunk.token_ids)
            pages.append(range(first_key // size, (end - 1) // size + 1))
        decodes, groups = [], []
        for i, chunk in enumerate(chunks):
            if len(chunk.token_ids) == 1:
                decodes.append(i)
            else:
                groups.append(self._group([i], pages, window))
        # Long contexts first, so that a group pads its members to nearly their own length.
        decodes.sort(key=lambda i: -len(pages[i]))
        while decodes:
            longest = len(pages[decodes[0]])
            most = max(1, MAX_GATHERED_TOKENS[self._device.type] // (longest * size))
            members = [i for i in decodes[:most] if 2 * len(pages[i]) >= longest]
            decodes = decodes[len(members) :]
            groups.append(self._group(sorted(members), pages, window))
        return groups

    def _group(self, members: list[int], pages: list[range], window: int | None) -> ChunkGroup:
        chunks = [self._batch.chunks[i] for i in members]
        starts = np.array([chunk.start for chunk in chunks])
        key_starts = np.array([pages[i].start * self._batch.block_size for i in members])
        num_queries = len(chunks[0].token_ids)
        blocks, skip = None, 0
        if starts.any() or num_queries == 1:
            # Padded with page 0: it is hidden by the mask, and no page holds anything but
            # finite numbers.
            table = np.zeros((len(members), max(len(pages[i]) for i in members)), dtype=np.int64)
            for row, i in enumerate(members):
                ids = self._batch.chunks[i].block_ids[pages[i].start : pages[i].stop]
                table[row, : len(ids)] = ids
            blocks = to_device(table.reshape(-1), self._device)
            if len(members) == 1 and window is not None:
                skip = max(0, int(starts[0]) - window + 1 - int(key_starts[0]))
                key_starts += skip
        return ChunkGroup(
            rows=self._rows([self._batch.query_starts[i] for i in members], num_queries),
            query_positions=starts[:, None] + np.arange(num_queries),
            key_starts=key_starts,
            num_keys=int((starts + num_queries - key_starts).max()),
            skip=skip,
            blocks=blocks,
            window=window,
            device=self._device,
        )

    def _rows(self, rows: list[int], num_queries: int) -> slice | torch.Tensor:
        # A slice is a view; an index tensor is a copy of all queries.
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + num_queries)
        return to_device(np.array(rows), self._device)
