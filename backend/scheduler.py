"""Who runs in the next step, with how many tokens, in which blocks.

Iteration-level scheduling (Orca, Yu et al., OSDI '22) with one token budget for decodes and prompt
chunks alike (Sarathi-Serve, Agrawal et al., OSDI '24), over a paged KV cache (PagedAttention, Kwon
et al., SOSP '23). Pure: requests in, plans out; no tensors, sockets, threads or clock of its own.
"""

from bisect import insort
from collections.abc import Iterable

from footplate.backend.backlog import Backlog
from footplate.backend.block_pool import BlockPool
from footplate.backend.prefix_cache import PrefixCache
from footplate.backend.prompt_reading import PromptReading
from footplate.backend.repetition import RepetitionDetector
from footplate.backend.request import Event, Request, State
from footplate.backend.siblings import Siblings
from footplate.backend.step import RowError, StepPlan, StepResult, produced
from footplate.backend.stopping import reason_to_stop
from footplate.backend.waiting_queue import WaitingQueue
from footplate.protocol.config import SchedulerConfig
from footplate.protocol.messages import FinishReason

NO_LIMIT = 2**31 - 1


class Scheduler:
    """Writes requests, and decides through the block pool who holds which block.

    Everyone has a rank: (priority, arrival time) under the priority policy, arrival time alone
    under first-come. `running` is sorted by rank, and its last is the first to lose its blocks; who
    is next of those that wait is the waiting queue's to say. The best ranked running request always
    progresses, whatever happens to the others, so nothing deadlocks.

    A request that runs alone is admitted like any other. From then on steps are its own, until it
    has its first token here or has ended; who runs besides keeps what it holds, and pauses. It got
    the blocks of its whole prompt when it was admitted, so it waits for nobody meanwhile.

    Args:
        enable_prefix_caching: whether blocks are found again by what they hold.
        blocks_can_be_shared: False where state is not addressed by block: not by siblings either.
        max_scored_rows: see `RunnerFacts`.

    Attributes:
        num_parked: requests that hold no blocks and are not to be run.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        blocks_can_be_shared: bool = True,
        max_scored_rows: int = NO_LIMIT,
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
        self._cache = PrefixCache(pool, enable_prefix_caching)
        self._can_share = blocks_can_be_shared
        self._reading = PromptReading(max_scored_rows)
        self._running: list[Request] = []
        self._alone: Request | None = None  # of those, the one whose steps are its own
        self._max_num_running = config.max_num_seqs  # less for a while when memory was short
        self._waiting = WaitingQueue(self._by_priority)
        self._num_held = 0
        self.num_parked = 0
        self._num_arrivals = 0
        self._released: list[int] = []
        self._admitted: list[Request] = []
        self.backlog = Backlog()
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens
        self.prefix_cache_hits = 0  # tokens

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none: held, new, or preempted."""
        return len(self._waiting) + self._num_held

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return self.num_running + self.num_waiting + self.num_parked

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything, or tell the runner anything."""
        return bool(self._running or self._waiting or self._released)

    # ---- requests come and go

    def hold(self, requests: list[Request]) -> None:
        """Take in a new request, or all the siblings of one prompt. They keep their place, but
        wait to be released."""
        num_tokens = len(requests[0].token_ids)
        assert 0 < num_tokens <= self._max_model_len
        for request in requests:
            request.arrival = self._num_arrivals
            self._num_arrivals += 1
            end = request.num_prompt_tokens + request.params.max_tokens
            request.max_num_tokens = min(end, self._max_model_len)
            self._reading.begin(request)
        if len(requests) > 1:
            num_full = (num_tokens - 1) // self._block_size
            siblings = Siblings(requests, num_full if self._can_share else 0)
            for request in requests:
                request.siblings = siblings
        self._num_held += len(requests)
        self.backlog.enter(requests)
        if (account := requests[0].account) is not None:
            account.num_requests += len(requests)

    def release(self, requests: list[Request]) -> None:
        """Queue what was held, as far as it has not ended and need not wait for a sibling."""
        siblings = requests[0].siblings
        for request in requests if siblings is None else siblings.ready:
            if request.state is State.HELD:
                self._queue(request)

    def _queue(self, request: Request) -> None:
        assert len(request.token_ids) < self._max_model_len, "it has come to its end"
        heir: Request | None = request
        while heir is not None:
            request = heir
            self._num_held -= 1
            request.advance(Event.RELEASE)
            if not request.is_unread:
                self._waiting.push(request)
                return
            heir = self._set_aside(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request from outside, between two steps."""
        if request.state is State.RUNNING:
            self._running.remove(request)
        self._finish(request, reason)

    def finish_all(self, requests: Iterable[Request], reason: FinishReason) -> None:
        """End requests from outside, between two steps. None of them has ended before."""
        for request in requests:
            self._finish(request, reason)
        self._drop_who_left()

    def _finish(self, request: Request, reason: FinishReason) -> None:
        state = request.state
        if state is State.HELD:
            self._num_held -= 1
        elif state is State.PARKED:
            self.num_parked -= 1
        self._end(request, reason)
        if state is State.WAITING or state is State.PREEMPTED:
            self._waiting.discard(request)

    def _drop_who_left(self) -> None:
        self._running = [r for r in self._running if r.state is State.RUNNING]

    def _end(self, request: Request, reason: FinishReason) -> None:
        was_held = request.state is State.HELD
        if request.state is State.RUNNING:
            self._take_blocks_from(request)
            self._max_num_running = min(self._max_num_running + 1, self._config.max_num_seqs)
        request.advance(Event.FINISH)
        request.finish_reason = reason
        if request.num_cached_tokens < 0:
            self.backlog.leave(request)
        if request.account is not None:
            request.account.num_requests -= 1
        if request.siblings is not None:
            heir = request.siblings.replace(request)
            if heir is not None and not was_held:
                self._queue(heir)

    def park(self, requests: Iterable[Request]) -> None:
        """Run these no further, between two steps. Those that are held may be made ready."""
        for request in requests:
            state = request.state
            request.is_unread = True
            if state is State.HELD or state is State.PARKED:
                continue
            if state is State.RUNNING:
                self._take_blocks_from(request)
            else:
                self._waiting.discard(request)
            if (heir := self._set_aside(request)) is not None:
                self._queue(heir)
        self._drop_who_left()

    def _set_aside(self, request: Request) -> Request | None:
        """Park who waits or has lost its blocks; who of its siblings computes their prompt now."""
        request.advance(Event.PARK)
        self.num_parked += 1
        return None if request.siblings is None else request.siblings.replace(request)

    def resume(self, requests: Iterable[Request]) -> None:
        """Let these run again; no error for who is not parked. They have their old places."""
        for request in requests:
            request.is_unread = False
            if request.state is State.PARKED:
                self.num_parked -= 1
                is_new = request.num_cached_tokens < 0
                request.advance(Event.RELEASE if is_new else Event.RESUME)
                self._waiting.push(request)

    def forget(self, share: bytes) -> None:
        """A client has left, or a session has ended, and its requests have."""
        self._waiting.forget(share)

    # ---- before a step

    def schedule(self, now: float) -> StepPlan:
        """Plan one step at time `now` (seconds, any origin).

        Running requests come first, by rank, each with at least one token; what the budget
        leaves goes to waiting ones, as long as slots and blocks last.
        """
        plan = StepPlan()
        self._reading.begin_plan()
        if self._by_priority:
            self._admit_urgent(now)
        if self._alone is None:
            self._admit_lone(now)
        if self._alone is not None:
            self._plan_alone(plan, self._alone)
        else:
            budget = self._plan_running(plan, self._config.max_num_batched_tokens)
            self._admit_waiting(plan, budget, now)
            if len(plan.requests) == 1 and self._config.long_prefill_token_threshold:
                self._lift_cap(plan)
        # Last, so that it covers who was preempted just now, even if readmitted at once.
        plan.released, self._released = self._released, []
        plan.admitted, self._admitted = self._admitted, []
        return plan

    def _plan_running(self, plan: StepPlan, budget: int) -> int:
        running, block_size = self._running, self._block_size
        index = 0
        while index < len(running):
            request = running[index]
            num_tokens = len(request.token_ids)
            start = request.num_computed_tokens
            count = num_tokens - start
            if count > 1:
                # A long prompt's chunk leaves one token for everyone who comes after it: nobody's
                # decode stalls behind a prefill.
                count = self._chunk(request, budget - (len(running) - index - 1))
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

    def _chunk(self, request: Request, budget: int, is_alone: bool = False) -> int:
        """How many tokens of a prompt to compute now."""
        count = min(len(request.token_ids) - request.num_computed_tokens, budget)
        if (cap := self._config.long_prefill_token_threshold) and not is_alone:
            count = min(count, cap)
        return self._reading.limit(request, count)

    def _lift_cap(self, plan: StepPlan) -> None:
        """Give a prompt that turned out to be alone the whole budget.

        Only now everybody who could take part has been asked. Its blocks are there: a prompt gets
        all of them with its admission.
        """
        [request] = plan.requests
        self._plan_alone(plan, request)

    def _plan_alone(self, plan: StepPlan, request: Request) -> None:
        count = self._chunk(request, self._config.max_num_batched_tokens, is_alone=True)
        plan.requests, plan.num_new_tokens = [request], [count]
        if request.num_computed_tokens + count == len(request.token_ids):
            plan.sampling = [0]

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
        self._waiting.push(request)

    def _take_blocks_from(self, request: Request) -> None:
        if request is self._alone:
            self._alone = None
        self._pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_registered_blocks = 0
        self._released.append(request.key)
        if request.siblings is not None:
            request.siblings.displaced(request)

    def _admit_lone(self, now: float) -> None:
        request = self._waiting.peek()
        if request is not None and request.runs_alone:
            self._try_admit(request, now)

    def _admit_waiting(self, plan: StepPlan, budget: int, now: float) -> None:
        while (
            budget > 0
            and (request := self._waiting.peek())
            and not request.runs_alone  # not in a step that others are in already
            and self._try_admit(request, now)
        ):
            count = self._chunk(request, budget)
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
        while self._alone is None and (urgent := self._waiting.peek()) and self._worse_than(urgent):
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
        shared = sum(block in held for block in self._cache.find(request))
        missing = self._num_blocks_for(len(request.token_ids)) - shared
        return missing <= self._pool.num_blocks - len(held)

    def _try_admit(self, request: Request, now: float) -> bool:
        """Admit the first of the waiting, if there is a slot and there are blocks."""
        if len(self._running) >= self._max_num_running:
            return False
        cached = self._cache.find(request)
        if not self._fits(request, cached):
            return False
        self._waiting.pop()
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
            self._admit_first(request, now)
        request.advance(Event.ADMIT)
        self._admitted.append(request)
        insort(self._running, request, key=self._waiting.rank)
        if request.runs_alone:
            self._alone = request
        if request.siblings is not None:
            request.siblings.admitted(request)

    def _admit_first(self, request: Request, now: float) -> None:
        """What happens to a request only once: it is going to have its first step."""
        self.backlog.leave(request)
        # A message and siblings have the list too, and from here on it grows.
        request.token_ids = request.token_ids.copy()
        request.scheduled_time = now
        num_prompt_tokens = request.num_prompt_tokens
        request.num_cached_tokens = min(request.num_computed_tokens, num_prompt_tokens)
        if request.params.repetition is not None:
            output = request.token_ids[num_prompt_tokens:]
            request.repetition = RepetitionDetector(request.params.repetition, output)
        if self._caching:
            self.prefix_cache_queries += num_prompt_tokens
            self.prefix_cache_hits += request.num_cached_tokens
        num_left = len(request.token_ids) - request.num_computed_tokens
        self._waiting.serve(request.share, num_left)

    def _fits(self, request: Request, cached: list[int]) -> bool:
        missing = self._num_blocks_for(len(request.token_ids)) - len(cached)
        return missing <= self._pool.num_free - self._pool.num_free_among(cached)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ---- after a step

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Apply what the runner computed for `plan`; return who finished.

        They have left the scheduler and carry their `finish_reason`; so have those of
        `result.errors` and `result.failed`, which are not among them.
        """
        for index in result.failed:
            self.finish(plan.requests[index], FinishReason.ERROR)
        for row in result.errors:
            # Before its blocks get names: what it computed last may be what is wrong.
            self._fail(plan.requests[plan.sampling[row]], result.errors[row])
        self._count_computed(plan, result)
        finished = []
        for row in result.already_complete:
            request = plan.requests[plan.sampling[row]]
            self.finish(request, FinishReason.STOP)
            finished.append(request)
        pairs = produced(plan, result)
        if self._alone is not None and pairs:
            self._alone.runs_alone = False  # its first token: from now on it is like any other
            self._alone = None
        if self._num_held:
            self._release_siblings(pairs)
        if self._waiting.is_shared:
            for request, _ in pairs:
                self._waiting.serve(request.share, 1)
        for request, token_id in pairs:
            token_ids = request.token_ids
            token_ids.append(token_id)
            if (
                token_id in request.params.stop_token_ids
                or len(token_ids) >= request.max_num_tokens
                or request.repetition is not None
            ) and (reason := reason_to_stop(request, token_id)) is not None:
                self._end(request, reason)
                finished.append(request)
        for row in result.complete:
            if row not in result.errors:
                self._complete(plan.requests[plan.sampling[row]], finished)
        if finished:
            self._drop_who_left()
        if result.short_of_memory:
            self._make_room_for(plan.requests[min(result.short_of_memory)])
        return finished

    def _fail(self, request: Request, error: RowError) -> None:
        if error.is_corrupted:
            # Where keys and values went wrong nobody knows, so all that have a name lose it. Who
            # shares some of them finds out by itself.
            self._pool.forget(request.block_ids[: request.num_registered_blocks])
        self.finish(request, FinishReason.ERROR)

    def _make_room_for(self, request: Request) -> None:
        """A request did not fit into memory, not even alone: the last in rank gives way.

        It does not come back before one of the others has ended, or it would be the next to find
        no memory, or the next reason for another to find none.
        """
        request.short_at = len(request.token_ids)
        if len(self._running) > 1:
            self._preempt(self._running.pop())
            self._max_num_running = len(self._running)

    def _count_computed(self, plan: StepPlan, result: StepResult) -> None:
        block_size, caching = self._block_size, self._caching
        for request, count in zip(plan.requests, plan.num_new_tokens, strict=True):
            request.num_computed_tokens += count
            num_full = request.num_computed_tokens // block_size
            if (
                caching
                and num_full > request.num_registered_blocks
                and request.state is State.RUNNING
            ):
                self._cache.register(request, num_full)
        self._reading.count(plan, result)

    def _release_siblings(self, pairs: list[tuple[Request, int]]) -> None:
        for request, _ in pairs:
            if request.siblings is not None:
                for sibling in request.siblings.let_go():
                    self._queue(sibling)

    def _complete(self, request: Request, finished: list[Request]) -> None:
        """Its grammar has come to its end, which comes before any other reason to stop."""
        if request.state is State.RUNNING:
            self._end(request, FinishReason.STOP)
            finished.append(request)
        request.finish_reason = FinishReason.STOP

    def check_ledger(self) -> None:
        """Assert every invariant that can be seen between two steps. For tests."""
        self._waiting.check_ledger()
        waiting = list(self._waiting)
        assert {r.state for r in self._running} <= {State.RUNNING}
        keys = {r.key for r in self._running}
        assert keys.isdisjoint(r.key for r in waiting)
        assert self._running == sorted(self._running, key=self._waiting.rank)
        for request in waiting:
            assert not request.block_ids
            assert not request.num_computed_tokens and not request.num_registered_blocks
        for request in self._running:
            assert request.num_computed_tokens < len(request.token_ids) < request.max_num_tokens
            assert request.num_computed_tokens <= len(request.block_ids) * self._block_size
            assert request.num_registered_blocks <= request.num_computed_tokens // self._block_size
            assert request.runs_alone == (request is self._alone)
        for request in (*self._running, *waiting):
            if request.siblings is not None:
                request.siblings.check_ledger(keys)
        new = [r for r in waiting if r.state is State.WAITING]
        num_hidden = self._num_held + self.num_parked
        assert len(new) <= self.backlog.num_requests <= len(new) + num_hidden
        assert self.backlog.num_tokens >= 0
        assert self._num_held >= 0 and self.num_parked >= 0
        self._pool.check_ledger(r.block_ids for r in self._running)
