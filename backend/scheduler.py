"""Who runs in the next step, with how many tokens, in which blocks.

Iteration-level scheduling (Orca, Yu et al., OSDI '22) with one token budget for decodes and prompt
chunks alike (Sarathi-Serve, Agrawal et al., OSDI '24), over a paged KV cache (PagedAttention, Kwon
et al., SOSP '23). Pure: requests in, plans out; no tensors, sockets, threads or clock of its own.
"""

from bisect import insort
from heapq import heapify, heappop, heappush

from footplate.backend.block_pool import BlockPool, prefix_hash, root_hash
from footplate.backend.request import Event, Request, State
from footplate.backend.step import StepPlan
from footplate.protocol.config import SchedulerConfig
from footplate.protocol.messages import FinishReason


class Scheduler:
    """Writes requests, and decides through the block pool who holds which block.

    Everyone has a rank: (priority, arrival) under the priority policy, arrival alone under
    first-come. `running` is sorted by rank, the waiting queue is a heap by rank. The best ranked
    request always progresses, whatever happens to the others, so nothing deadlocks or starves.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        max_model_len: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        assert max_model_len <= pool.num_blocks * pool.block_size, "one request must always fit"
        # Every running request gets at least one token in every step.
        assert config.max_num_batched_tokens >= config.max_num_seqs > 0
        self._config = config
        self._by_priority = config.policy == "priority"
        self._pool = pool
        self._block_size = pool.block_size
        self._max_model_len = max_model_len
        self._caching = enable_prefix_caching
        self._running: list[Request] = []
        # Finished requests stay in the heap until they surface or are too many.
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._num_waiting = 0
        self._num_arrivals = 0
        self._released: list[int] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens
        self.prefix_cache_hits = 0  # tokens

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: new, or preempted."""
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything, or tell the runner anything."""
        return bool(self._running or self._num_waiting or self._released)

    def _rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self._by_priority else 0, request.arrival)

    # ---- requests come and go

    def add(self, request: Request) -> None:
        """Queue a new request."""
        assert 0 < len(request.token_ids) < self._max_model_len
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._enqueue(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request from outside, between two steps."""
        if request.state is State.RUNNING:
            self._running.remove(request)
        else:
            self._num_waiting -= 1
        self._end(request, reason)
        if len(self._waiting) > 2 * self._num_waiting + 64:
            self._waiting = [w for w in self._waiting if w[1].state is not State.FINISHED]
            heapify(self._waiting)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.state is State.RUNNING:
            self._take_blocks_from(request)
        request.advance(Event.FINISH)
        request.finish_reason = reason

    def _enqueue(self, request: Request) -> None:
        heappush(self._waiting, (self._rank(request), request))
        self._num_waiting += 1

    def _peek_waiting(self) -> Request | None:
        while self._waiting:
            request = self._waiting[0][1]
            if request.state is not State.FINISHED:
                return request
            heappop(self._waiting)
        return None

    # ---- before a step

    def schedule(self, now: float) -> StepPlan:
        """Plan one step at time `now` (seconds, any origin).

        Running requests come first, by rank, each with at least one token; what the budget
        leaves goes to waiting ones, as long as slots and blocks last.
        """
        plan = StepPlan()
        if self._by_priority:
            self._admit_urgent(now)
        budget = self._plan_running(plan, self._config.max_num_batched_tokens)
        self._admit_waiting(plan, budget, now)
        # Last, so that it covers who was preempted just now, even if readmitted at once.
        plan.released, self._released = self._released, []
        return plan

    def _plan_running(self, plan: StepPlan, budget: int) -> int:
        running, block_size = self._running, self._block_size
        index = 0
        while index < len(running):
            request = running[index]
            num_tokens = len(request.token_ids)
            start = request.num_computed_tokens
            # A long prompt's chunk leaves one token for everyone who comes after it: nobody's
            # decode stalls behind a prefill.
            count = min(num_tokens - start, budget - (len(running) - index - 1))
            end = start + count
            if end > len(request.block_ids) * block_size and not self._grow(request, end):
                break  # it was the last in rank, and has been preempted itself
            if end == num_tokens:
                plan.sampling.append(index)
            plan.requests.append(request)
            plan.num_new_tokens.append(count)
            budget -= count
            index += 1
        return budget

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give a running request room for `num_tokens`; preempt the last in rank until there is.
        False when that was the request itself."""
        missing = self._num_blocks_for(num_tokens) - len(request.block_ids)
        while self._pool.num_free < missing:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self._pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        """By recomputation: the blocks go, the tokens stay and are computed again."""
        self._take_blocks_from(request)
        request.advance(Event.PREEMPT)
        self.num_preemptions += 1
        self._enqueue(request)

    def _take_blocks_from(self, request: Request) -> None:
        self._pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_registered_blocks = 0
        self._released.append(request.key)

    def _admit_waiting(self, plan: StepPlan, budget: int, now: float) -> None:
        while budget > 0 and (request := self._peek_waiting()) and self._try_admit(request, now):
            count = min(len(request.token_ids) - request.num_computed_tokens, budget)
            if request.num_computed_tokens + count == len(request.token_ids):
                plan.sampling.append(len(plan.requests))
            plan.requests.append(request)
            plan.num_new_tokens.append(count)
            budget -= count

    def _admit_urgent(self, now: float) -> None:
        """Under the priority policy a waiting request displaces running ones of worse priority.

        It is admitted before the budget is dealt out by rank, or the long prompt of a worse
        request would keep it waiting to its end.
        """
        while (urgent := self._peek_waiting()) and self._worse_than(urgent):
            if not self._try_admit(urgent, now):
                if not self._would_fit_instead_of_worse(urgent):
                    return
                self._preempt(self._running.pop())

    def _worse_than(self, request: Request) -> bool:
        return bool(self._running) and self._running[-1].priority > request.priority

    def _would_fit_instead_of_worse(self, request: Request) -> bool:
        """Whether it helps to displace: what better requests hold may still be in the way."""
        held = {
            block
            for better in self._running
            if better.priority <= request.priority
            for block in better.block_ids
        }
        shared = sum(block in held for block in self._find_cached_prefix(request))
        missing = self._num_blocks_for(len(request.token_ids)) - shared
        return missing <= self._pool.num_blocks - len(held)

    def _try_admit(self, request: Request, now: float) -> bool:
        """Admit the first of the waiting, if there is a slot and there are blocks."""
        if len(self._running) >= self._config.max_num_seqs:
            return False
        cached = self._find_cached_prefix(request)
        if not self._fits(request, cached):
            return False
        heappop(self._waiting)
        self._num_waiting -= 1
        self._admit(request, cached, now)
        return True

    def _admit(self, request: Request, cached: list[int], now: float) -> None:
        self._pool.share(cached)
        # All blocks of the prompt at once: a prompt that got half of its blocks could only wait
        # for others to finish while holding what they need.
        missing = self._num_blocks_for(len(request.token_ids)) - len(cached)
        request.block_ids = cached + self._pool.allocate(missing)
        request.num_registered_blocks = len(cached)
        request.num_computed_tokens = len(cached) * self._block_size
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = request.num_computed_tokens
            request.scheduled_time = now
            if self._caching:
                self.prefix_cache_queries += request.num_prompt_tokens
                self.prefix_cache_hits += request.num_computed_tokens
        request.advance(Event.ADMIT)
        insort(self._running, request, key=self._rank)

    def _fits(self, request: Request, cached: list[int]) -> bool:
        missing = self._num_blocks_for(len(request.token_ids)) - len(cached)
        return missing <= self._pool.num_free - self._pool.num_free_among(cached)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ---- the prefix cache

    def _find_cached_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the longest cached prefix. At least one token is left to compute:
        its logits are what the next token is sampled from."""
        if not self._caching:
            return []
        found: list[int] = []
        size = self._block_size
        for index in range((len(request.token_ids) - 1) // size):
            block = self._pool.find(
                self._block_hash(request, index),
                request.token_ids[index * size : (index + 1) * size],
            )
            if block is None:
                break
            found.append(block)
        return found

    def _block_hash(self, request: Request, index: int) -> bytes:
        hashes, size = request.block_hashes, self._block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_hash(request.cache_salt)
            start = len(hashes) * size
            hashes.append(prefix_hash(parent, request.token_ids[start : start + size]))
        return hashes[index]

    def _register_full_blocks(self, request: Request, num_full: int) -> None:
        size = self._block_size
        for index in range(request.num_registered_blocks, num_full):
            tokens = request.token_ids[index * size : (index + 1) * size]
            self._pool.register(request.block_ids[index], self._block_hash(request, index), tokens)
        request.num_registered_blocks = num_full

    # ---- after a step

    def update(self, plan: StepPlan, sampled: list[int]) -> bool:
        """Apply what the runner computed for `plan`; return whether any request finished.

        Requests that finished have left the scheduler and carry their `finish_reason`.
        """
        block_size, caching = self._block_size, self._caching
        for request, count in zip(plan.requests, plan.num_new_tokens, strict=True):
            request.num_computed_tokens += count
            num_full = request.num_computed_tokens // block_size
            if caching and num_full > request.num_registered_blocks:
                self._register_full_blocks(request, num_full)
        any_finished = False
        for index, token_id in zip(plan.sampling, sampled, strict=True):
            request = plan.requests[index]
            request.token_ids.append(token_id)
            reason = self._reason_to_stop(request, token_id)
            if reason is not None:
                self._end(request, reason)
                any_finished = True
        if any_finished:
            self._running = [r for r in self._running if r.state is State.RUNNING]
        return any_finished

    def _reason_to_stop(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
        if token_id in params.stop_token_ids and num_output_tokens > params.min_tokens:
            return FinishReason.STOP
        if num_output_tokens >= params.max_tokens:
            return FinishReason.LENGTH
        if len(request.token_ids) >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def check_ledger(self) -> None:
        """Assert every invariant that can be seen between two steps. For tests."""
        waiting = [r for _, r in self._waiting if r.state is not State.FINISHED]
        assert len(waiting) == self._num_waiting
        for index, entry in enumerate(self._waiting[1:], 1):
            assert self._waiting[(index - 1) // 2] < entry, "the waiting queue is no heap"
        assert {r.state for r in self._running} <= {State.RUNNING}
        assert {r.state for r in waiting} <= {State.WAITING, State.PREEMPTED}
        assert not {r.key for r in self._running} & {r.key for r in waiting}
        assert self._running == sorted(self._running, key=self._rank)
        for request in waiting:
            assert not request.block_ids
            assert not request.num_computed_tokens and not request.num_registered_blocks
        for request in self._running:
            assert request.num_computed_tokens < len(request.token_ids)
            assert request.num_computed_tokens <= len(request.block_ids) * self._block_size
            assert request.num_registered_blocks <= request.num_computed_tokens // self._block_size
        self._pool.check_ledger(r.block_ids for r in self._running)
