"""A model runner that computes nothing and believes nobody."""

from collections import Counter
from itertools import chain
from zlib import crc32

from footplate.backend.request import Request
from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.step import RunnerFacts, StepPlan, StepResult

# A token, and a digest of the salt and of all tokens up to and including it: as keys and values
# do, an entry depends on everything before it.
Entry = tuple[int, int]


class CheckingRunner:
    """Owns a KV memory of entries, and asserts that every plan treats it as a real runner needs.

    A token is sampled from what is read back through the block table, so whatever puts the
    wrong content there is caught, or changes the stream: a wrong table, a block shared, evicted or
    handed on too early, a prefix that is not the request's own.
    """

    def __init__(
        self,
        facts: RunnerFacts,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        may_displace: bool,
    ) -> None:
        self.facts = facts
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._may_displace = may_displace
        self._memory: list[list[Entry | None]] = [
            [None] * block_size for _ in range(facts.num_kv_blocks)
        ]
        self._entries: dict[int, list[Entry]] = {}  # by key: what its tokens must look like
        self.lengths: dict[int, int] = {}  # by key of who runs: tokens in the cache
        self.last_requests: list[Request] = []
        self.num_sampled = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        self._let_go(plan.released)
        self._check_shape(plan)
        work = list(zip(plan.requests, plan.num_new_tokens, strict=True))
        for request, _ in work:
            self._check_start(request)
        holders = Counter(chain.from_iterable(request.block_ids for request in plan.requests))
        for request, count in work:
            self._write(request, count, holders)
        self.last_requests = plan.requests
        self.num_sampled += len(plan.sampling)
        return StepResult([self._sample(plan.requests[index]) for index in plan.sampling])

    def _let_go(self, released: list[int]) -> None:
        assert len(set(released)) == len(released), "released twice"
        for key in released:
            # An urgent request may be admitted, and lose its place to a better one's growth,
            # before the runner has ever seen it.
            assert key in self.lengths or self._may_displace, "released, and never ran"
            self.lengths.pop(key, None)

    def _check_shape(self, plan: StepPlan) -> None:
        keys = [request.key for request in plan.requests]
        assert len(set(keys)) == len(keys) <= self._max_num_seqs
        assert self.lengths.keys() <= set(keys), "who runs gets a token in every step"
        assert all(count > 0 for count in plan.num_new_tokens)
        assert sum(plan.num_new_tokens) <= self._max_num_batched_tokens
        assert plan.sampling == [
            index
            for index, (request, count) in enumerate(
                zip(plan.requests, plan.num_new_tokens, strict=True)
            )
            if request.num_computed_tokens + count == len(request.token_ids)
        ]

    def _check_start(self, request: Request) -> None:
        """What was computed is there before this step writes anything: nothing may be shared that
        is only being computed."""
        start = request.num_computed_tokens
        if request.key in self.lengths:
            assert start == self.lengths[request.key], "a gap, or computed twice"
        else:
            assert start % self._block_size == 0, "only full blocks are shared"
        assert self._read(request, start) == self._true_entries(request)[:start]

    def _write(self, request: Request, count: int, holders: Counter[int]) -> None:
        start = request.num_computed_tokens
        entries = self._true_entries(request)
        for position in range(start, start + count):
            block = request.block_ids[position // self._block_size]
            assert holders[block] == 1, "written by one, read by another"
            self._memory[block][position % self._block_size] = entries[position]
        self.lengths[request.key] = start + count

    def _sample(self, request: Request) -> int:
        context = self._read(request, self.lengths[request.key])
        assert context == self._true_entries(request)
        digest = digest_prefix([entry[0] for entry in context if entry])
        position = len(context) - request.num_prompt_tokens
        return next_token(digest, position, request.params, self.facts.model.vocab_size)

    def _read(self, request: Request, length: int) -> list[Entry | None]:
        """The first `length` tokens, as attention would see them."""
        num_blocks = -(-length // self._block_size)
        assert num_blocks <= len(request.block_ids)
        content: list[Entry | None] = []
        for block in request.block_ids[:num_blocks]:
            content += self._memory[block]
        return content[:length]

    def _true_entries(self, request: Request) -> list[Entry]:
        entries = self._entries.setdefault(request.key, [])
        digest = entries[-1][1] if entries else crc32(request.cache_salt.encode())
        for token_id in request.token_ids[len(entries) :]:
            digest = digest_prefix([token_id], digest)
            entries.append((token_id, digest))
        return entries
