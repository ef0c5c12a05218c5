"""Scheduler and model runner, tied together. No sockets, no threads, and a clock that is given:
tests drive it with plain calls, `core_process` drives it with ZeroMQ.
"""

import logging
from collections.abc import Callable

from footplate.backend import fail_points
from footplate.backend.admission import Admission, RefusalError, handles_of, make_requests
from footplate.backend.block_pool import BlockPool
from footplate.backend.deadlines import Deadlines
from footplate.backend.delivery import Delivery
from footplate.backend.request import Request, State
from footplate.backend.scheduler import Scheduler
from footplate.backend.step import ModelRunner, StepPlan, StepResult, produced
from footplate.backend.structured.interface import CompiledGrammar, CompilesGrammars, GrammarError
from footplate.protocol.config import CacheConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    AttachRequest,
    ControlReply,
    Drain,
    ErrorKind,
    FinishReason,
    GetStats,
    Limits,
    ParkRequests,
    ResetPrefixCache,
    ResumeRequests,
    Started,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import Grammar

logger = logging.getLogger(__name__)

ClientId = bytes
Requested = (
    AddRequest
    | AttachRequest
    | AbortRequests
    | ParkRequests
    | ResumeRequests
    | ResetPrefixCache
    | GetStats
    | Drain
)


class EngineCore:
    """Owns the live requests of every client, by client and handle.

    Every handle of every AddRequest gets exactly one `Finished`, whatever happens to it. The
    scheduler holds a request until its grammar is compiled.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        epoch: int,
        clock: Callable[[], float],
        requests: RequestConfig = RequestConfig(),  # noqa: B008 (frozen)
        grammars: CompilesGrammars | None = None,
    ) -> None:
        facts = runner.facts
        caching = cache.enable_prefix_caching and facts.supports_prefix_caching
        self.model = facts.model
        self.limits = Limits(
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            policy=scheduler.policy,
            block_size=cache.block_size,
            num_kv_blocks=facts.num_kv_blocks,
            enable_prefix_caching=caching,
        )
        self.epoch = epoch
        self._runner = runner
        self._clock = clock  # monotonic, seconds
        self._pool = BlockPool(facts.num_kv_blocks, cache.block_size)
        self._scheduler = Scheduler(
            scheduler,
            self._pool,
            facts.model.max_model_len,
            caching,
            facts.supports_prefix_caching,
            facts.max_scored_rows,
        )
        self._admission = Admission(facts.model, requests)
        self._deadlines = Deadlines()
        self._delivery = Delivery(epoch)
        self._requests: dict[ClientId, dict[int, Request]] = {}
        self._grammars = grammars
        self._compiling: dict[int, list[Request]] = {}  # by the key of the first
        self._num_keys = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do now."""
        return self._scheduler.has_work or bool(self._delivery)

    @property
    def seconds_to_deadline(self) -> float | None:
        """How long `step` may be left uncalled when there is no work; None is for ever."""
        due = self._deadlines.next_due
        return None if due is None else max(0.0, due - self._clock())

    # ---- what clients say

    def join(self, client: ClientId) -> None:
        """A client that may send requests from now on, until it leaves."""
        assert client not in self._requests, "its requests would be out of reach"
        self._requests[client] = {}

    def leave(self, client: ClientId) -> None:
        """Free everything a client held, and forget it. Unknown clients are no error."""
        for request in self._requests.pop(client, {}).values():
            self._scheduler.finish(request, FinishReason.ABORT)
        self._scheduler.forget(client)
        self._delivery.forget(client)

    def handle(self, client: ClientId, message: Requested) -> ControlReply | None:
        """Apply one message. Control calls are answered at once."""
        requests = self._requests.get(client)
        if requests is None:
            return None  # it left while its message was under way
        match message:
            case AddRequest():
                self._add(client, requests, message)
            case AbortRequests(handles=handles):
                for handle in handles:
                    if request := requests.get(handle):
                        self._finish(request, FinishReason.ABORT)
            case ResetPrefixCache(call=call):
                ok = self._pool.forget_cached()
                return ControlReply(call, ok, "" if ok else "requests are running")
            case GetStats(call=call):
                return ControlReply(call, True, stats=self.stats())
        return None

    def _add(self, client: ClientId, live: dict[int, Request], message: AddRequest) -> None:
        try:
            self._admission.check(message, live, self._scheduler.backlog)
        except RefusalError as refusal:
            logger.info("request %d refused: %s", message.handle, refusal)
            for handle in handles_of(message):
                self.refuse(client, handle, str(refusal), refusal.kind)
            return
        requests = make_requests(client, message, self._num_keys + 1, self._clock())
        self._num_keys += len(requests)
        for request in requests:
            live[request.handle] = request
            self._num_prompt_tokens += request.num_prompt_tokens
            if message.ttft_deadline_s is not None or message.deadline_s is not None:
                self._deadlines.add(request, message.ttft_deadline_s, message.deadline_s)
        # Held, they keep their place, and can end.
        self._scheduler.hold(requests)
        if message.params.grammar is None:
            self._scheduler.release(requests)
        else:
            self._compile(requests, message.params.grammar)

    def refuse(
        self, client: ClientId, handle: int, why: str, kind: ErrorKind = ErrorKind.INVALID
    ) -> None:
        """End a request that has never been taken in."""
        live = self._requests.get(client)
        # The end of one that goes on would be a lie.
        if live is not None and handle not in live:
            self._delivery.end(client, handle, FinishReason.ERROR, why, kind)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        message: str = "",
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        """End a request between two steps."""
        self._scheduler.finish(request, reason)
        del self._requests[request.client][request.handle]
        self._delivery.end(request.client, request.handle, reason, message, kind)

    # ---- grammars

    def _compile(self, requests: list[Request], grammar: Grammar) -> None:
        """Release a request, or the siblings of one prompt, as soon as their grammar is compiled:
        now, if it is."""
        key = requests[0].key
        outcome: CompiledGrammar | GrammarError | None
        if self._grammars is None:
            outcome = GrammarError("this engine core compiles no grammars")
        else:
            outcome = self._grammars.submit(key, grammar)
        if outcome is None:
            self._compiling[key] = requests
        else:
            self._on_compiled(requests, outcome)

    def _take_compiled(self) -> None:
        assert self._grammars is not None, "nobody compiles what is waited for"
        for key, outcome in self._grammars.take_finished():
            self._on_compiled(self._compiling.pop(key), outcome)

    def _on_compiled(
        self, requests: list[Request], outcome: CompiledGrammar | GrammarError
    ) -> None:
        if isinstance(outcome, GrammarError):
            for request in requests:
                if request.state is State.HELD:  # it was not aborted meanwhile
                    self._finish(request, FinishReason.ERROR, str(outcome), ErrorKind.GRAMMAR)
            return
        for request in requests:
            request.grammar = outcome
        self._scheduler.release(requests)

    # ---- one step

    def step(self) -> None:
        """Run one iteration of continuous batching (Orca, OSDI '22, section 3).

        Every running request advances by one token, or by one chunk of its prompt. New requests
        join and finished ones leave between two calls, never inside one.
        """
        if self._compiling:
            self._take_compiled()
        now = self._clock()
        for request in self._deadlines.take_overdue(now):
            self._finish(request, FinishReason.DEADLINE)
        plan = self._scheduler.schedule(now)
        if fail_points.ENABLED and plan.requests:
            fail_points.reach("core.step", plan.requests)
            fail_points.reach("runner.execute", plan.requests)
        result = self._runner.execute(plan)
        if not plan.requests:
            return
        self._num_steps += 1
        finished = self._scheduler.update(plan, result)
        for index, rows in result.prompt_logprobs.items():
            request = plan.requests[index]
            self._delivery.score_prompt(request.client, request.handle, rows)
        self._tell_tokens(plan, result)
        for row, error in result.errors.items():
            request = plan.requests[plan.sampling[row]]
            logger.info("request %d failed: %s", request.handle, error.message)
            del self._requests[request.client][request.handle]
            self._delivery.end(
                request.client, request.handle, FinishReason.ERROR, error.message, error.kind
            )
        for request in finished:
            assert request.finish_reason is not None
            del self._requests[request.client][request.handle]
            self._delivery.end(request.client, request.handle, request.finish_reason)

    def _tell_tokens(self, plan: StepPlan, result: StepResult) -> None:
        now = self._clock()
        pairs = produced(plan, result)
        self._num_generation_tokens += len(pairs)
        scored = {
            plan.requests[plan.sampling[row]].key: rows for row, rows in result.logprobs.items()
        }
        client = None
        for request, token_id in pairs:
            if request.client != client:
                client = request.client
                columns = self._delivery.to(client)
            position = len(request.token_ids) - request.num_prompt_tokens - 1
            columns.handles.append(request.handle)
            columns.positions.append(position)
            columns.token_ids.append(token_id)
            if position == request.num_prior_tokens:
                columns.started.append(self._started(request, now))
            if scored and (rows := scored.get(request.key)):
                self._delivery.score(request.client, request.handle, position, rows)
                client = None  # these columns may be full

    def _started(self, request: Request, now: float) -> Started:
        return Started(
            handle=request.handle,
            num_cached_tokens=request.num_cached_tokens,
            queue_time_s=request.scheduled_time - request.arrival_time,
            prefill_time_s=now - request.scheduled_time,
        )

    def take_outputs(self) -> list[tuple[ClientId, StepOutputs]]:
        """What every client is to be told; each output is handed out once."""
        return self._delivery.take()

    def stats(self, num_bad_messages: int = 0) -> Stats:
        """The books, as they stand between two steps."""
        scheduler, pool = self._scheduler, self._pool
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_bad_messages=num_bad_messages,
        )

    def check_ledger(self) -> None:
        """Assert the invariants of scheduler, pool and request tables. For tests."""
        self._scheduler.check_ledger()
        live = sum(len(requests) for requests in self._requests.values())
        assert live == self._scheduler.num_running + self._scheduler.num_waiting
