"""Scheduler and model runner, tied together. No sockets, no threads, and a clock that is given:
tests drive it with plain calls, `core_process` drives it with ZeroMQ.
"""

from collections.abc import Callable

import msgspec

from footplate.backend.block_pool import BlockPool
from footplate.backend.request import Event, Request
from footplate.backend.scheduler import Scheduler
from footplate.backend.step import ModelRunner
from footplate.backend.structured.interface import CompiledGrammar, CompilesGrammars, GrammarError
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ControlReply,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Limits,
    ResetPrefixCache,
    Started,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import Grammar

ClientId = bytes
Requested = AddRequest | AbortRequests | ResetPrefixCache | GetStats


class _Columns(msgspec.Struct):
    """What one client is to be told at the next border between two steps."""

    handles: list[int] = []
    positions: list[int] = []
    token_ids: list[int] = []
    started: list[Started] = []
    finished: list[Finished] = []


class EngineCore:
    """Owns the live requests of every client, by client and handle.

    Every AddRequest gets exactly one `Finished`, whatever happens to it. A request whose grammar is
    being compiled is live, and the scheduler's only when that is done.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        epoch: int,
        clock: Callable[[], float],
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
        self._scheduler = Scheduler(scheduler, self._pool, facts.model.max_model_len, caching)
        self._requests: dict[ClientId, dict[int, Request]] = {}
        self._columns: dict[ClientId, _Columns] = {}
        self._grammars = grammars
        self._compiling: dict[int, Request] = {}  # by key
        self._num_keys = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work or bool(self._columns)

    # ---- what clients say

    def join(self, client: ClientId) -> None:
        """A client that may send requests from now on, until it leaves."""
        assert client not in self._requests, "its requests would be out of reach"
        self._requests[client] = {}

    def leave(self, client: ClientId) -> None:
        """Free everything a client held, and forget it. Unknown clients are no error."""
        for request in self._requests.pop(client, {}).values():
            self._end_early(request, FinishReason.ABORT)
        self._columns.pop(client, None)

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
                    if request := requests.pop(handle, None):
                        self._end_early(request, FinishReason.ABORT)
                        self._tell_end(client, handle, FinishReason.ABORT)
            case ResetPrefixCache(call=call):
                ok = self._pool.forget_cached()
                return ControlReply(call, ok, "" if ok else "requests are running")
            case GetStats(call=call):
                return ControlReply(call, True, stats=self.stats())
        return None

    def _add(self, client: ClientId, requests: dict[int, Request], message: AddRequest) -> None:
        if problem := self._why_invalid(requests, message):
            self._tell_end(client, message.handle, FinishReason.ERROR, problem)
            return
        self._num_keys += 1
        requests[message.handle] = request = Request(
            key=self._num_keys,
            client=client,
            handle=message.handle,
            token_ids=list(message.prompt_token_ids),  # grows; a message does not
            num_prompt_tokens=len(message.prompt_token_ids),
            params=message.params,
            priority=message.priority,
            cache_salt=message.cache_salt,
            arrival_time=self._clock(),
        )
        self._num_prompt_tokens += request.num_prompt_tokens
        if message.params.grammar is None:
            self._scheduler.add(request)
        else:
            self._compile(request, message.params.grammar)

    def _why_invalid(self, requests: dict[int, Request], message: AddRequest) -> str:
        """The client has checked all this with better words; a core that believed it could be
        ended by one bad client."""
        prompt, limit = message.prompt_token_ids, self.model.max_model_len
        if message.handle in requests:
            return f"handle {message.handle} is in use"
        if not 0 < len(prompt) < limit:
            return f"the prompt has {len(prompt)} tokens, must be 1 to {limit - 1}"
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            return f"token ids must be 0 to {self.model.vocab_size - 1}"
        return ""

    def _end_early(self, request: Request, reason: FinishReason) -> None:
        """End a live request from outside, wherever it waits or runs."""
        if self._compiling.pop(request.key, None):
            request.advance(Event.FINISH)
            request.finish_reason = reason
        else:
            self._scheduler.finish(request, reason)

    def _tell_end(
        self,
        client: ClientId,
        handle: int,
        reason: FinishReason,
        message: str = "",
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        columns = self._columns_of(client)
        columns.finished.append(Finished(handle, reason, message, kind))

    def _columns_of(self, client: ClientId) -> _Columns:
        columns = self._columns.get(client)
        if columns is None:
            columns = self._columns[client] = _Columns()
        return columns

    # ---- grammars

    def _compile(self, request: Request, grammar: Grammar) -> None:
        """Give a request to the scheduler as soon as its grammar is compiled: now, if it is."""
        self._compiling[request.key] = request
        if self._grammars is None:
            error = GrammarError("this engine core compiles no grammars")
            self._on_compiled(request.key, error)
        elif compiled := self._grammars.submit(request.key, grammar):
            self._on_compiled(request.key, compiled)

    def _take_compiled(self) -> None:
        assert self._grammars is not None, "nobody compiles what is waited for"
        for key, outcome in self._grammars.take_finished():
            self._on_compiled(key, outcome)

    def _on_compiled(self, key: int, outcome: CompiledGrammar | GrammarError) -> None:
        request = self._compiling.get(key)
        if request is None:
            return  # it was aborted meanwhile
        if isinstance(outcome, GrammarError):
            self._end_early(request, FinishReason.ERROR)
            del self._requests[request.client][request.handle]
            self._tell_end(
                request.client,
                request.handle,
                FinishReason.ERROR,
                str(outcome),
                ErrorKind.GRAMMAR,
            )
        else:
            del self._compiling[key]
            request.grammar = outcome
            self._scheduler.add(request)

    # ---- one step

    def step(self) -> None:
        """Run one iteration of continuous batching (Orca, OSDI '22, section 3).

        Every running request advances by one token, or by one chunk of its prompt. New requests
        join and finished ones leave between two calls, never inside one.
        """
        if self._compiling:
            self._take_compiled()
        plan = self._scheduler.schedule(self._clock())
        sampled = self._runner.execute(plan).token_ids
        if not plan.requests:
            return
        self._num_steps += 1
        self._num_generation_tokens += len(sampled)
        any_finished = self._scheduler.update(plan, sampled)
        now = self._clock()
        producers = [plan.requests[index] for index in plan.sampling]
        for request, token_id in zip(producers, sampled, strict=True):
            columns = self._columns.get(request.client) or self._columns_of(request.client)
            position = len(request.token_ids) - request.num_prompt_tokens - 1
            columns.handles.append(request.handle)
            columns.positions.append(position)
            columns.token_ids.append(token_id)
            if not position:
                columns.started.append(self._started(request, now))
        if any_finished:
            for request in producers:
                if request.finish_reason is not None:
                    del self._requests[request.client][request.handle]
                    self._tell_end(request.client, request.handle, request.finish_reason)

    def _started(self, request: Request, now: float) -> Started:
        return Started(
            handle=request.handle,
            num_cached_tokens=request.num_cached_tokens,
            queue_time_s=request.scheduled_time - request.arrival_time,
            prefill_time_s=now - request.scheduled_time,
        )

    def take_outputs(self) -> list[tuple[ClientId, StepOutputs]]:
        """What every client is to be told; each output is handed out once."""
        if not self._columns:
            return []
        taken, self._columns = self._columns, {}
        return [
            (
                client,
                StepOutputs(
                    self.epoch, c.handles, c.positions, c.token_ids, [], c.started, c.finished
                ),
            )
            for client, c in taken.items()
        ]

    def stats(self, num_bad_messages: int = 0) -> Stats:
        """The books, as they stand between two steps."""
        scheduler, pool = self._scheduler, self._pool
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._compiling),
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
        assert live == sum(
            (self._scheduler.num_running, self._scheduler.num_waiting, len(self._compiling))
        )
