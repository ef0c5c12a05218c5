"""What of a request is computed already: blocks with a name, and blocks of siblings."""

from footplate.backend.block_pool import BlockPool, prefix_hash, root_hash
from footplate.backend.request import Request


class PrefixCache:
    """Finds and names full blocks. Owns nothing: the pool knows the names, requests their hashes.

    Args:
        enabled: whether blocks get names. Siblings share theirs all the same.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._block_size = pool.block_size
        self._enabled = enabled

    def find(self, request: Request) -> list[int]:
        """Blocks that hold the longest prefix that may be read. At least one token is left to
        compute: its logits are what the next token is sampled from."""
        most = self._num_readable_blocks(request)
        shared = self._find_at_siblings(request) if request.siblings is not None else []
        if len(shared) == most or not self._enabled:
            return shared
        return max(shared, self._find_named(request, most), key=len)

    def _num_readable_blocks(self, request: Request) -> int:
        num_tokens = len(request.token_ids) - 1
        if request.num_scored < request.num_prompt_tokens:
            # The logits that score a position are those of the token before it.
            num_tokens = min(num_tokens, max(0, request.num_scored - 1))
        return num_tokens // self._block_size

    def _find_at_siblings(self, request: Request) -> list[int]:
        siblings = request.siblings
        assert siblings is not None
        donor = siblings.find_donor(self._block_size)
        if donor is None:
            return []
        num_shared = siblings.num_shared_blocks
        if len(request.block_hashes) < num_shared:
            request.block_hashes = donor.block_hashes[:num_shared]
        return donor.block_ids[:num_shared]

    def _find_named(self, request: Request, most: int) -> list[int]:
        found: list[int] = []
        size = self._block_size
        for index in range(most):
            block = self._pool.find(
                self._block_hash(request, index),
                request.token_ids[index * size : (index + 1) * size],
            )
            if block is None:
                break
            found.append(block)
        return found

    def register(self, request: Request, num_full: int) -> None:
        """Name the request's first `num_full` blocks, which are computed."""
        size = self._block_size
        for index in range(request.num_registered_blocks, num_full):
            tokens = request.token_ids[index * size : (index + 1) * size]
            self._pool.register(request.block_ids[index], self._block_hash(request, index), tokens)
        request.num_registered_blocks = num_full

    def _block_hash(self, request: Request, index: int) -> bytes:
        hashes, size = request.block_hashes, self._block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            start = len(hashes) * size
            hashes.append(prefix_hash(parent, request.token_ids[start : start + size]))
        return hashes[index]
