"""Scheduler and model runner, tied together. No sockets, no threads, and a clock that is given:
tests drive it with plain calls, `core_process` drives it with ZeroMQ.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from footplate.backend import fail_points
from footplate.backend.admission import Admission, RefusalError, handles_of, make_requests
from footplate.backend.attaching import Attaching
from footplate.backend.awaited_grammars import AwaitedGrammars
from footplate.backend.block_pool import BlockPool
from footplate.backend.deadlines import Deadlines
from footplate.backend.delivery import Delivery
from footplate.backend.detached import Leases
from footplate.backend.draining import Draining
from footplate.backend.live_requests import LiveRequests
from footplate.backend.quotas import Quota, Quotas
from footplate.backend.roles import Peer
from footplate.backend.scheduler import Scheduler
from footplate.backend.step import ModelRunner
from footplate.backend.step_guard import StepGuard
from footplate.backend.structured.interface import CompilesGrammars
from footplate.backend.telling import Telling
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
    Stats,
    StepOutputs,
)

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


@dataclass(frozen=True, slots=True)
class _Client:
    """One that is here.

    Attributes:
        session: empty where nothing outlives its connection.
        quota: None where it has no limit of its own.
    """

    session: bytes
    quota: Quota | None


class EngineCore:
    """Owns who is here, and has everybody else do their part in the right order.

    Every handle of every AddRequest and AttachRequest gets exactly one `Finished`, whatever happens
    to it.
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
        self._live = LiveRequests(self._scheduler, self._delivery)
        self._attaching = Attaching(
            self._leases, self._live, self._scheduler, self._delivery, clock
        )
        self._grammars = AwaitedGrammars(grammars, self._scheduler, self._live)
        self._telling = Telling(self._live, self._leases, self._delivery, clock)
        self._draining = Draining()
        self._replies: list[tuple[ClientId, Attached | ControlReply]] = []
        self._clients: dict[ClientId, _Client] = {}
        self._quotas = Quotas()
        self._num_keys = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do now, or there is something to take."""
        return self._scheduler.has_work or bool(self._delivery or self._replies)

    @property
    def is_drained(self) -> bool:
        """Whether somebody is to be told that nothing is left: as soon as clients have taken what
        they were told before, or at the deadline, which `seconds_to_deadline` counts."""
        return self._draining.is_awaited and not self._scheduler.num_live

    @property
    def seconds_to_deadline(self) -> float | None:
        """How long `step` may be left uncalled when there is no work; None is for ever."""
        due = [self._deadlines.next_due, self._leases.next_due]
        if self._draining.is_awaited or (self._draining.is_on and self._scheduler.num_live):
            due.append(self._draining.deadline)
        first = min((time for time in due if time is not None), default=None)
        return None if first is None else max(0.0, first - self._clock())

    @property
    def is_draining(self) -> bool:
        """Whether somebody has asked it to take no new requests."""
        return self._draining.is_on

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
        self._live.join(client)
        self._clients[client] = _Client(session, self._quotas.of(peer))
        if session:
            self._leases.enter(session)

    def leave(self, client: ClientId, may_return: bool = False) -> None:
        """Free everything a client held, and forget it. Unknown clients are no error.

        Args:
            may_return: its connection is gone, and its session may have another. Its requests with
                an id go on meanwhile.
        """
        known = self._clients.pop(client, None)
        if known is None:
            return
        if known.session and may_return:
            self._attaching.detach(known.session)
        elif known.session:
            self._leases.end(known.session)
        self._attaching.end_orphans()
        self._live.leave(client)
        if not known.session:
            self._scheduler.forget(client)
        self._attaching.forget_sessions()
        self._delivery.forget(client)

    # ---- what clients say

    def handle(self, client: ClientId, message: Requested) -> ControlReply | None:
        """Apply one message. Most control calls are answered at once, the others by
        `take_replies`."""
        known = self._clients.get(client)
        if known is None:
            return None  # it left while its message was under way
        match message:
            case AddRequest():
                self._add(client, known, message)
            case AttachRequest():
                self._attach(client, known, message)
            case AbortRequests(handles=handles, have_ended=True):
                # Their tokens are told with this end to whoever attaches. The stop string is among
                # them, and is found again there.
                self._live.finish_all(self._live.among(client, handles), FinishReason.STOP)
            case AbortRequests(handles=handles):
                if self._leases:
                    for handle in handles:
                        self._leases.abandon(client, handle)
                self._live.finish_all(self._live.among(client, handles), FinishReason.ABORT)
            case ParkRequests(handles=handles):
                self._scheduler.park(self._live.among(client, handles))
            case ResumeRequests(handles=handles):
                self._scheduler.resume(self._live.among(client, handles))
            case ResetPrefixCache(call=call):
                ok = self._pool.forget_cached()
                return ControlReply(call, ok, "" if ok else "requests are running")
            case GetStats(call=call):
                return ControlReply(call, True, stats=self.stats())
            case Drain():
                return self._draining.ask(client, message, self._clock())
        return None

    def _add(self, client: ClientId, known: _Client, message: AddRequest) -> None:
        session, quota = known.session, known.quota
        live = self._live.of(client)
        assert live is not None
        request_id = message.request_id if session else None
        if message.run_alone and not self._has_suspects:
            message = msgspec.structs.replace(message, run_alone=False)
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
                self._attaching.make_free(session, request_id, message.is_replay)
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
            self._live.add(request)
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
            self._grammars.submit(requests, grammar, end)

    def _attach(self, client: ClientId, known: _Client, message: AttachRequest) -> None:
        try:
            answer = self._attaching.attach(client, known.session, message)
        except RefusalError as refusal:
            self.refuse(client, message.handle, str(refusal), refusal.kind)
        else:
            self._replies.append((client, answer))

    def refuse(
        self, client: ClientId, handle: int, why: str, kind: ErrorKind = ErrorKind.INVALID
    ) -> None:
        """End a request that has never been taken in."""
        live = self._live.of(client)
        # The end of one that goes on would be a lie.
        if live is not None and handle not in live:
            self._delivery.end(client, handle, FinishReason.ERROR, why, kind)

    # ---- one step

    def step(self) -> None:
        """Run one iteration of continuous batching (Orca, OSDI '22, section 3).

        Every running request advances by one token, or by one chunk of its prompt. New requests
        join and finished ones leave between two calls, never inside one.
        """
        if self._grammars:
            self._grammars.take_compiled()
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
        self._telling.tell(plan, result, finished)

    def _end_overdue(self, now: float) -> None:
        """End what has run out of time: its own, its lease's, or the engine's."""
        for request in self._deadlines.take_overdue(now):
            self._live.finish(request, FinishReason.DEADLINE)
        self._attaching.expire(now)
        if self._draining.deadline <= now:
            self._live.finish_all(self._live, FinishReason.ABORT)

    def take_replies(
        self, has_backlog: bool = False
    ) -> list[tuple[ClientId, Attached | ControlReply]]:
        """What is to be told before the outputs, in order; each reply is handed out once.

        Whoever waits for the last request's end is told when that is no news any more: the engine
        may be ended then.

        Args:
            has_backlog: whether clients have still to take what they were told.
        """
        if self.is_drained and not self._delivery:
            self._replies += self._draining.take_replies(self._clock(), has_backlog)
        replies, self._replies = self._replies, []
        return replies

    def take_outputs(self) -> list[tuple[ClientId, StepOutputs]]:
        """What every client is to be told; each output is handed out once."""
        return self._attaching.keep_own(self._delivery.take())

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
            num_generation_tokens=self._telling.num_generation_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_bad_messages=num_bad_messages,
            num_void_steps=self._guard.num_void_steps,
            num_corrupted_requests=self._telling.num_corrupted_requests,
            num_parked=scheduler.num_parked,
            num_detached=self._leases.num_detached,
            num_rejected_peers=num_rejected_peers,
        )

    def check_ledger(self) -> None:
        """Assert the invariants of scheduler, pool and request tables. For tests."""
        self._scheduler.check_ledger()
        self._live.check_ledger()
        live = list(self._live)
        assert len(live) == self._scheduler.num_live
        self._leases.check_ledger(live)
