"""A model runner that computes nothing and believes nobody."""

from collections import Counter
from itertools import chain
from zlib import crc32

from footplate.backend.request import Request
from footplate.backend.runner.fake import digest_prefix
from footplate.backend.step import RowError, RunnerFacts, ScoredRows, StepPlan, StepResult

from .marks import Marks
from .oracle import chosen_token, row_of

# A token, and a digest of the salt and of all tokens up to and including it: as keys and values
# do, an entry depends on everything before it.
Entry = tuple[int, int]


class BrokenPlan(BaseException):
    """A plan is not what a runner needs. No guard of the core may take that for the failure of a
    request, and go on."""


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
        long_prefill_token_threshold: int,
        may_displace: bool,
        marks: Marks,
    ) -> None:
        self.facts = facts
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._long_prefill_token_threshold = long_prefill_token_threshold
        self._may_displace = may_displace
        self._marks = marks
        self._memory: list[list[Entry | None]] = [
            [None] * block_size for _ in range(facts.num_kv_blocks)
        ]
        self._entries: dict[int, list[Entry]] = {}  # by key: what its tokens must look like
        self.lengths: dict[int, int] = {}  # by key of who runs: tokens in the cache
        self._running: list[Request] = []
        self._computed_prompts: set[int] = set()  # by id of the siblings whose it is
        self.last_requests: list[Request] = []
        self.num_sampled = 0
        self.num_served: Counter[bytes] = Counter()  # by client, as the token counter has it
        self.seen: Counter[str] = Counter()

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        try:
            return self._execute(plan)
        except AssertionError as error:
            raise BrokenPlan(*error.args) from error

    def _execute(self, plan: StepPlan) -> StepResult:
        self._let_go(plan.released)
        self._check_shape(plan)
        work = list(zip(plan.requests, plan.num_new_tokens, strict=True))
        # Who goes on is asked before who comes.
        self._running = [r for r in plan.requests if r.key in self.lengths]
        for request, _ in work:
            self._check_start(request)
        holders = Counter(chain.from_iterable(request.block_ids for request in plan.requests))
        for request, count in work:
            self._write(request, count, holders)
        self.last_requests = plan.requests
        result = StepResult()
        for index, (request, count) in enumerate(work):
            if rows := self._score_prompt(request, count):
                result.prompt_logprobs[index] = rows
        for row, index in enumerate(plan.sampling):
            self._sample(row, plan.requests[index], plan.num_new_tokens[index], result)
        return result

    def forget(self, client: bytes) -> None:
        """A client has left; when it comes back it starts with nothing."""
        self.last_requests = [r for r in self.last_requests if r.client != client]
        del self.num_served[client]

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
        if any(request.runs_alone for request in plan.requests):
            assert len(keys) == 1, "who runs alone has others beside it"
        else:
            assert self.lengths.keys() <= set(keys), "who runs gets a token in every step"
        assert all(count > 0 for count in plan.num_new_tokens)
        assert sum(plan.num_new_tokens) <= self._max_num_batched_tokens
        if len(keys) > 1 and self._long_prefill_token_threshold:
            assert max(plan.num_new_tokens) <= self._long_prefill_token_threshold
        families = Counter(id(r.siblings) for r in plan.requests if r.siblings)
        for request in plan.requests:
            siblings = request.siblings
            if siblings and siblings.num_shared_blocks and families[id(siblings)] > 1:
                assert id(siblings) in self._computed_prompts, "a prompt is computed twice"
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
            self._check_first_step(request)
        assert self._read(request, start) == self._true_entries(request)[:start]

    def _check_first_step(self, request: Request) -> None:
        """It begins, or begins again; what could be shared with a sibling is."""
        if request.key not in self._entries:
            num_left = len(request.token_ids) - request.num_computed_tokens
            self.num_served[request.client] += num_left
        if siblings := request.siblings:
            shared = siblings.num_shared_blocks * self._block_size
            donors = [r for r in self._running if r.siblings is siblings]
            if any(self.lengths[r.key] >= shared for r in donors):
                self.seen["shared with a sibling"] += shared > 0
                assert request.num_computed_tokens >= shared, "not shared with a sibling"

    def _write(self, request: Request, count: int, holders: Counter[int]) -> None:
        start = request.num_computed_tokens
        entries = self._true_entries(request)
        for position in range(start, start + count):
            block = request.block_ids[position // self._block_size]
            assert holders[block] == 1, "written by one, read by another"
            self._memory[block][position % self._block_size] = entries[position]
        self.lengths[request.key] = start + count

    def _score_prompt(self, request: Request, count: int) -> ScoredRows | None:
        wanted = request.params.logprobs
        if wanted is None or wanted.num_prompt_logprobs is None:
            return None
        start, prompt = request.num_computed_tokens, request.token_ids[: request.num_prompt_tokens]
        if request.num_scored < len(prompt):
            assert count <= self.facts.max_scored_rows
        first = max(1, start + 1, wanted.prompt_start, request.num_scored)
        positions = range(first, min(start + count + 1, len(prompt)))
        if not positions:
            return None
        ranks, token_ids, logprobs = zip(*(row_of(prompt, p) for p in positions), strict=True)
        return ScoredRows(first, list(ranks), b"".join(token_ids), b"".join(logprobs))

    def _sample(self, row: int, request: Request, count: int, result: StepResult) -> None:
        length = self.lengths[request.key]
        context = self._read(request, length)
        assert context == self._true_entries(request)
        position = length - request.num_prompt_tokens
        place = (request.client, request.handle, position)
        num_prior, grammar = request.num_prior_tokens, request.params.grammar
        if 0 < num_prior == position and self._marks.is_complete_before(*place, grammar):
            result.token_ids.append(-1)
            result.already_complete.add(row)
            self.seen["complete before"] += 1
            return
        if kind := self._marks.error_at(*place):
            result.token_ids.append(-1)
            result.errors[row] = RowError(kind, "as marked")
            # Whatever it has written is not to be read by anybody.
            for written in range(length - count, length):
                block = request.block_ids[written // self._block_size]
                self._memory[block][written % self._block_size] = None
            return
        token_ids = [entry[0] for entry in context if entry]
        vocab_size = self.facts.model.vocab_size
        output = token_ids[request.num_prompt_tokens :]
        token_id = chosen_token(digest_prefix(token_ids), output, request.params, vocab_size)
        result.token_ids.append(token_id)
        if self._marks.is_complete_at(*place, grammar):
            result.complete.add(row)
        if (wanted := request.params.logprobs) and wanted.num_logprobs is not None:
            rank, ids, logprobs = row_of([*token_ids, token_id], length)
            result.logprobs[row] = ScoredRows(position, [rank], ids, logprobs)
        self.num_sampled += 1
        self.num_served[request.client] += 1
        if request.siblings:
            self._computed_prompts.add(id(request.siblings))

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
