"""Scheduler and model runner, tied together. No sockets, no threads, and a clock that is given:
tests drive it with plain calls, `core_process` drives it with ZeroMQ.
"""

import logging
from collections.abc import Callable, Iterable

import msgspec

from footplate.backend import fail_points
from footplate.backend.admission import (
    MAX_HANDLE,
    Admission,
    RefusalError,
    handles_of,
    make_requests,
)
from footplate.backend.block_pool import BlockPool
from footplate.backend.deadlines import Deadlines
from footplate.backend.delivery import Delivery
from footplate.backend.detached import DETACHED, Lease, Leases
from footplate.backend.draining import Draining
from footplate.backend.quotas import Quota, Quotas
from footplate.backend.request import Request, State
from footplate.backend.roles import Peer
from footplate.backend.scheduler import Scheduler
from footplate.backend.step import ModelRunner, StepPlan, StepResult, failures, produced
from footplate.backend.step_guard import StepGuard
from footplate.backend.structured.interface import CompiledGrammar, CompilesGrammars, GrammarError
from footplate.protocol.config import CacheConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
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

    Every handle of every AddRequest and AttachRequest gets exactly one `Finished`, whatever happens
    to it. The scheduler holds a request until its grammar is compiled. A request that has lost its
    client and waits for it is `DETACHED`'s, under its key.
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
        has_suspects: bool = True,
    ) -> None:
        """Args:
        has_suspects: whether a request may ask to be run alone: behind a crash. Otherwise
            clients could keep each other waiting with it.
        """
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
        self._guard = StepGuard(runner)
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
        self._has_suspects = has_suspects
        self._deadlines = Deadlines()
        self._leases = Leases(requests.lease_s, requests.lease_bytes, clock)
        self._delivery = Delivery(epoch, self._leases.on_end)
        self._draining = Draining()
        self._replies: list[tuple[ClientId, Attached | ControlReply]] = []
        self._requests: dict[ClientId, dict[int, Request]] = {DETACHED: {}}
        self._sessions: dict[ClientId, bytes] = {}  # of clients that are here
        self._quotas = Quotas()
        self._quota_of: dict[ClientId, Quota] = {}  # of clients that have one
        self._grammars = grammars
        # By the key of the first: who waits for a grammar, and how it ends then, if it does.
        self._compiling: dict[int, tuple[list[Request], FinishReason | None]] = {}
        self._num_keys = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_corrupted_requests = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do now, or there is something to take."""
        return (
            self._scheduler.has_work
            or bool(self._delivery or self._replies)
            or (self._draining.is_awaited and not self._num_live)
        )

    @property
    def seconds_to_deadline(self) -> float | None:
        """How long `step` may be left uncalled when there is no work; None is for ever."""
        due = [self._deadlines.next_due, self._leases.next_due]
        if self._draining.is_on and self._num_live:
            due.append(self._draining.deadline)
        first = min((time for time in due if time is not None), default=None)
        return None if first is None else max(0.0, first - self._clock())

    @property
    def is_draining(self) -> bool:
        """Whether somebody has asked it to take no new requests."""
        return self._draining.is_on

    @property
    def _num_live(self) -> int:
        scheduler = self._scheduler
        return scheduler.num_running + scheduler.num_waiting + scheduler.num_parked

    # ---- clients come and go

    def join(
        self,
        client: ClientId,
        session: bytes = b"",
        peer: Peer = Peer(),  # noqa: B008 (frozen)
    ) -> None:
        """A client that may send requests from now on, until it leaves.

        Args:
            session: names the client across its connections, of which it has one at a time; empty
                where nothing outlives this one.
            peer: who it is, with its limits.
        """
        assert client not in self._requests, "its requests would be out of reach"
        self._requests[client] = {}
        if (quota := self._quotas.of(peer)) is not None:
            self._quota_of[client] = quota
        self._sessions[client] = session
        if session:
            self._leases.enter(session)

    def leave(self, client: ClientId, may_return: bool = False) -> None:
        """Free everything a client held, and forget it. Unknown clients are no error.

        Args:
            may_return: its connection is gone, and its session may have another. Its requests with
                an id go on meanwhile.
        """
        live = self._requests.pop(client, None)
        if live is None:
            return
        session = self._sessions.pop(client)
        self._quota_of.pop(client, None)
        if session and may_return:
            for lease in self._leases.leave(session):
                self._detach(lease, live)
        elif session:
            self._leases.end(session)
        self._end_orphans()
        self._scheduler.finish_all(live.values(), FinishReason.ABORT)
        if not session:
            self._scheduler.forget(client)
        self._forget_sessions()
        self._delivery.forget(client)

    def _detach(self, lease: Lease, live: dict[int, Request]) -> None:
        request = lease.request
        assert request is not None
        if request.client == DETACHED:
            return  # nobody has attached to it since
        del live[request.handle]
        self._requests[DETACHED][request.key] = request
        self._leases.move(lease, DETACHED, request.key)
        self._scheduler.resume([request])  # what nobody reads is kept now

    def _end_orphans(self) -> None:
        for request in self._leases.take_orphans():
            if request.state is not State.FINISHED:
                self._finish(request, FinishReason.ABORT)

    def _forget_sessions(self) -> None:
        for session in self._leases.take_gone():
            self._scheduler.forget(session)

    # ---- what clients say

    def handle(self, client: ClientId, message: Requested) -> ControlReply | None:
        """Apply one message. Most control calls are answered at once, the others by
        `take_replies`."""
        requests = self._requests.get(client)
        if requests is None:
            return None  # it left while its message was under way
        match message:
            case AddRequest():
                self._add(client, requests, message)
            case AttachRequest():
                self._attach(client, requests, message)
            case AbortRequests(handles=handles):
                aborted = _live_among(handles, requests)
                if self._leases:
                    for request in aborted:
                        self._leases.abandon(request)
                self._finish_all(aborted, FinishReason.ABORT)
            case ParkRequests(handles=handles):
                self._scheduler.park(_live_among(handles, requests))
            case ResumeRequests(handles=handles):
                self._scheduler.resume(_live_among(handles, requests))
            case ResetPrefixCache(call=call):
                ok = self._pool.forget_cached()
                return ControlReply(call, ok, "" if ok else "requests are running")
            case GetStats(call=call):
                return ControlReply(call, True, stats=self.stats())
            case Drain():
                return self._drain(client, message)
        return None

    def _add(self, client: ClientId, live: dict[int, Request], message: AddRequest) -> None:
        session = self._sessions[client]
        request_id = message.request_id if session else None
        if message.run_alone and not self._has_suspects:
            message = msgspec.structs.replace(message, run_alone=False)
        quota = self._quota_of.get(client)
        frame = b""
        try:
            if self._draining.is_on and not message.is_replay:
                raise RefusalError(
                    "the engine is about to end and takes no new requests", ErrorKind.DRAINING
                )
            self._admission.check(message, live, self._scheduler.backlog)
            if quota is not None:
                quota.check(message)
            if request_id is not None:
                frame = self._leases.encode(message)
                self._make_free(session, request_id, message.is_replay)
        except RefusalError as refusal:
            logger.info("request %d refused: %s", message.handle, refusal)
            for handle in handles_of(message):
                self.refuse(client, handle, str(refusal), refusal.kind)
            return
        end, grammar = self._admission.end_of_prior(message), message.params.grammar
        if end is not None and grammar is None:
            for handle in handles_of(message):
                self._delivery.end(client, handle, end)
            return
        requests = make_requests(client, message, self._num_keys + 1, self._clock(), session)
        self._num_keys += len(requests)
        for request in requests:
            live[request.handle] = request
            request.account = None if quota is None else quota.account
            self._num_prompt_tokens += request.num_prompt_tokens
            if message.ttft_deadline_s is not None or message.deadline_s is not None:
                self._deadlines.add(request, message.ttft_deadline_s, message.deadline_s)
        if request_id is not None:
            self._leases.add(session, request_id, frame, requests[0])
        # Held, they keep their place, and can end.
        self._scheduler.hold(requests)
        if grammar is None:
            self._scheduler.release(requests)
        else:
            self._compile(requests, grammar, end)

    def _make_free(self, session: bytes, request_id: str, is_replay: bool) -> None:
        """Let a request have this id: one that has ended makes way, and so does one without a
        client for its own replay."""
        lease = self._leases.find(session, request_id)
        if lease is None:
            return
        request = lease.request
        if request is not None and not (is_replay and request.client == DETACHED):
            raise RefusalError(f"request_id {request_id!r} is in use by a request that goes on")
        self._leases.drop(lease)
        self._end_orphans()

    def _attach(self, client: ClientId, live: dict[int, Request], message: AttachRequest) -> None:
        handle = message.handle
        lease = self._leases.find(self._sessions[client], message.request_id)
        if lease is None or handle in live or not 0 <= handle <= MAX_HANDLE:
            why = f"this session has no request of the id {message.request_id!r}: it was not sent, "
            self.refuse(
                client, handle, f"{why}it was aborted, or its lease has expired", ErrorKind.LOST
            )
            return
        request = lease.request
        if request is not None:
            old_client, old_handle = request.client, request.handle
            del self._requests[old_client][old_handle]
            self._leases.move(lease, client, handle)
            live[handle] = request
            if old_client != DETACHED:  # it asks for what it has, and gets it under one name
                self._delivery.end(old_client, old_handle, FinishReason.ABORT)
            self._scheduler.resume([request])
        self._replies.append((client, Attached(handle, lease.message(self._clock()))))
        self._delivery.tell_again(client, handle, lease.output(), lease.started)
        if (end := lease.end) is not None:
            self._leases.on_answer(lease)
            self._delivery.end(client, handle, end.reason, end.message, end.kind)

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

    def _finish_all(self, requests: Iterable[Request], reason: FinishReason) -> None:
        """As `_finish`, for many at once."""
        requests = list(requests)
        self._scheduler.finish_all(requests, reason)
        for request in requests:
            del self._requests[request.client][request.handle]
            self._delivery.end(request.client, request.handle, reason)

    # ---- ends that come with time

    def _drain(self, client: ClientId, message: Drain) -> ControlReply | None:
        seconds = message.timeout_s
        if seconds is not None and not seconds >= 0:  # NaN neither
            return ControlReply(message.call, False, f"timeout_s is {seconds}, must be at least 0")
        deadline = None if seconds is None else self._clock() + seconds
        self._draining.begin(client, message.call, deadline)
        return None

    def _end_overdue(self, now: float) -> None:
        """End what has run out of time: its own, its lease's, or the engine's."""
        for request in self._deadlines.take_overdue(now):
            self._finish(request, FinishReason.DEADLINE)
        self._leases.expire(now)
        self._end_orphans()
        self._forget_sessions()
        if self._draining.deadline <= now:
            left = [request for live in self._requests.values() for request in live.values()]
            self._finish_all(left, FinishReason.ABORT)

    # ---- grammars

    def _compile(self, requests: list[Request], grammar: Grammar, end: FinishReason | None) -> None:
        """Release a request, or the siblings of one prompt, as soon as their grammar is compiled:
        now, if it is. Or end them, if their output has come to its end."""
        key = requests[0].key
        outcome: CompiledGrammar | GrammarError | None
        if self._grammars is None:
            outcome = GrammarError("this engine core compiles no grammars")
        else:
            outcome = self._grammars.submit(key, grammar)
        if outcome is None:
            self._compiling[key] = requests, end
        else:
            self._on_compiled(requests, end, outcome)

    def _take_compiled(self) -> None:
        assert self._grammars is not None, "nobody compiles what is waited for"
        for key, outcome in self._grammars.take_finished():
            self._on_compiled(*self._compiling.pop(key), outcome)

    def _on_compiled(
        self,
        requests: list[Request],
        end: FinishReason | None,
        outcome: CompiledGrammar | GrammarError,
    ) -> None:
        waited = [r for r in requests if r.state is State.HELD]  # not those that were aborted
        if isinstance(outcome, GrammarError):
            for request in waited:
                self._finish(request, FinishReason.ERROR, str(outcome), ErrorKind.GRAMMAR)
        elif end is not None:
            for request in waited:
                # The end of a grammar comes before any other.
                is_complete = _is_complete(outcome, request)
                self._finish(request, FinishReason.STOP if is_complete else end)
        else:
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
        self._end_overdue(now)
        plan = self._scheduler.schedule(now)
        if fail_points.ENABLED and plan.requests:
            fail_points.reach("core.step", plan.requests)
        plan, result = self._guard.execute(plan)
        if not plan.requests:
            return
        self._num_steps += 1
        finished = self._scheduler.update(plan, result)
        for index, rows in result.prompt_logprobs.items():
            request = plan.requests[index]
            self._delivery.score_prompt(request.client, request.handle, rows)
        self._tell_tokens(plan, result)
        for request, error in failures(plan, result):
            logger.info("request %d failed: %s", request.handle, error.message)
            self._num_corrupted_requests += error.is_corrupted
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
        started = Started(
            handle=request.handle,
            num_cached_tokens=request.num_cached_tokens,
            queue_time_s=request.scheduled_time - request.arrival_time,
            prefill_time_s=now - request.scheduled_time,
        )
        self._leases.on_start(request.client, started)
        return started

    def take_replies(
        self, has_backlog: bool = False
    ) -> list[tuple[ClientId, Attached | ControlReply]]:
        """What is to be told before the outputs, in order; each reply is handed out once.

        Whoever waits for the last request's end is told when that is no news any more: the engine
        may be ended then.

        Args:
            has_backlog: whether clients have still to take what they were told.
        """
        draining = self._draining
        is_empty = not self._num_live and not self._delivery
        if draining.is_awaited and is_empty and has_backlog:
            is_empty = draining.deadline <= self._clock()  # who does not read is not waited for
        if draining.is_awaited and is_empty:
            self._replies += [
                (client, ControlReply(call, True)) for client, call in draining.take_calls()
            ]
        replies, self._replies = self._replies, []
        return replies

    def take_outputs(self) -> list[tuple[ClientId, StepOutputs]]:
        """What every client is to be told; each output is handed out once."""
        outputs = self._delivery.take()
        if self._requests[DETACHED] or any(client == DETACHED for client, _ in outputs):
            for client, output in outputs:
                if client == DETACHED:
                    self._leases.count_tokens(output.handles)
            self._end_orphans()
            outputs = [(client, output) for client, output in outputs if client != DETACHED]
        return outputs

    def stats(self, num_bad_messages: int = 0, num_rejected_peers: int = 0) -> Stats:
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
            num_void_steps=self._guard.num_void_steps,
            num_corrupted_requests=self._num_corrupted_requests,
            num_parked=scheduler.num_parked,
            num_detached=self._leases.num_detached,
            num_rejected_peers=num_rejected_peers,
        )

    def check_ledger(self) -> None:
        """Assert the invariants of scheduler, pool and request tables. For tests."""
        self._scheduler.check_ledger()
        live = [r for requests in self._requests.values() for r in requests.values()]
        assert len(live) == self._num_live
        for client, requests in self._requests.items():
            assert all((r.client, r.handle) == (client, h) for h, r in requests.items())
        self._leases.check_ledger(live)


def _is_complete(grammar: CompiledGrammar, request: Request) -> bool:
    """Whether the grammar allows nothing behind the output that a request came with."""
    try:
        return grammar.start().advance(request.token_ids[request.num_prompt_tokens :])
    except Exception:  # whatever the engine says of it, the output has an end already
        return False


def _live_among(handles: Iterable[int], live: dict[int, Request]) -> list[Request]:
    """Each once, in the order of the handles."""
    return [live[handle] for handle in dict.fromkeys(handles) if handle in live]
