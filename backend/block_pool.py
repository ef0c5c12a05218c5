"""The KV cache's blocks: who holds which, and what the unheld ones still contain.

Pure bookkeeping over block ids: the memory behind them belongs to the model runner.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


def root_hash(cache_salt: str) -> bytes:
    """The parent of a sequence's first block: blocks are shared only under equal salts."""
    return sha256(b"footplate-prefix\0" + cache_salt.encode()).digest()


def prefix_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name a full block by its own tokens and, through its parent, all tokens before them.

    SHA-256: with a weaker hash a crafted prompt could be served another tenant's prefix.
    """
    return sha256(parent + array("I", token_ids).tobytes()).digest()


class BlockPool:
    """Owns the blocks: reference counts, the free list, the prefix cache.

    A block is *held* (by one request, or by several that share a prefix), or *free*. A free block
    may still be *cached*: it keeps its content and its name until it is handed out again, least
    recently used first. At all times held + free = num_blocks.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        # Insertion order is the order of eviction. An OrderedDict, not a dict: taking from the
        # front of a dict walks over all that was deleted there before.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_by_hash: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones among them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks with a name, held or free."""
        return len(self._content)

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks; their old content is forgotten. The caller has checked `num_free`."""
        assert num_blocks <= len(self._free), f"{num_blocks} of {len(self._free)} free blocks"
        return [self._take_oldest() for _ in range(num_blocks)]

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._num_holders[block] = 1
        content = self._content.pop(block, None)
        if content is not None:
            del self._block_by_hash[content[0]]
        return block

    def find(self, name: bytes, token_ids: Sequence[int]) -> int | None:
        """The cached block of this name, if it really holds these tokens.

        Tokens are compared: a hash is a name, not a proof.
        """
        block = self._block_by_hash.get(name)
        if block is None or self._content[block][1] != tuple(token_ids):
            return None
        return block

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks would leave the free list if they were shared."""
        return sum(1 for block in blocks if not self._num_holders[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Hold cached blocks once more."""
        for block in blocks:
            if not self._num_holders[block]:
                del self._free[block]
            self._num_holders[block] += 1

    def register(self, block: int, name: bytes, token_ids: Sequence[int]) -> None:
        """Name a held, full, computed block so that others can find it.

        When two requests computed the same prefix side by side, the first keeps the name.
        """
        assert self._num_holders[block] and len(token_ids) == self.block_size
        if name not in self._block_by_hash and block not in self._content:
            self._block_by_hash[name] = block
            self._content[block] = (name, tuple(token_ids))

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop the names of those that one request alone holds. What others hold too is theirs."""
        for block in blocks:
            if self._num_holders[block] == 1 and (content := self._content.pop(block, None)):
                del self._block_by_hash[content[0]]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block of a sequence.

        In reverse, so that the end of a prefix is evicted before its start: the start is what
        other requests are likely to share. Blocks without content go first of all.
        """
        for block in reversed(blocks):
            holders = self._num_holders[block] - 1
            assert holders >= 0, f"block {block} released twice"
            self._num_holders[block] = holders
            if not holders:
                self._free[block] = None
                if block not in self._content:
                    self._free.move_to_end(block, last=False)

    def forget_cached(self) -> bool:
        """Drop all names. Refused, with False, while any block is held."""
        if len(self._free) != self.num_blocks:
            return False
        self._block_by_hash.clear()
        self._content.clear()
        return True

    def check_ledger(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the pool's invariants against the block tables of all requests. For tests."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        assert holders == self._num_holders, "reference counts differ from the block tables"
        assert set(self._free) == {b for b, n in enumerate(holders) if not n}
        named = {name: block for block, (name, _) in self._content.items()}
        assert named == self._block_by_hash
