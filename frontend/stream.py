"""One request as its consumer sees it: an async iterator that holds at most one pending output."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from footplate.frontend.completion import Completion
from footplate.frontend.logprobs import Logprobs, ScoredTokens
from footplate.frontend.notices import Notices
from footplate.frontend.output_text import OutputText
from footplate.frontend.outputs import RequestMetrics, RequestOutput
from footplate.protocol.errors import FootplateError
from footplate.protocol.messages import (
    AddRequest,
    AttachRequest,
    FinishReason,
    LogprobRows,
    Started,
)
from footplate.protocol.params import RequestOutputKind, SamplingParams


class RequestStream:
    """Owns what the client knows of one live request beside its completions.

    The engine client pushes, to the completions and here; one consumer iterates. An output holds
    the completions that have news; with `FINAL_ONLY` there is one output, with all of them.

    Attributes:
        completions: one for each of `n`; the handles are consecutive.
        num_unfinished: completions that have not ended.
        num_queued_tokens: prompt tokens that wait for their first step, as far as is known.
        sent: what is on its way to the core, or has been taken in: its request, which can be given
            to another core with the tokens so far, or the question for it (see `attaching`).
    """

    __slots__ = (
        "_error",
        "_interval",
        "_on_abandoned",
        "_prompt_logprobs",
        "_waiter",
        "_was_closed",
        "completions",
        "is_final_only",
        "max_unread_tokens",
        "metrics",
        "notices",
        "num_cached_tokens",
        "num_queued_tokens",
        "num_unfinished",
        "params",
        "prompt",
        "prompt_scored",
        "prompt_token_ids",
        "request_id",
        "seed",
        "sent",
    )

    def __init__(
        self,
        request_id: str,
        handle: int,
        params: SamplingParams,
        seed: int,
        metrics: RequestMetrics,
        on_abandoned: Callable[["RequestStream"], None],
        stream_interval: int = 1,
        max_unread_tokens: int | None = None,
        notices: Notices | None = None,
    ) -> None:
        """Open a stream; `begin` says what it is about.

        Args:
            handle: of the first completion.
            on_abandoned: called when the consumer closes the stream before its end.
            stream_interval: of requests that name none.
            max_unread_tokens: see `Completion`; None is no limit.
            notices: where it is noted that a completion is to be parked, or to go on.
        """
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids: list[int] = []
        self.params = params
        self.seed = seed
        self.metrics = metrics
        self.num_cached_tokens: int | None = None
        self.num_queued_tokens = 0
        self.sent: AddRequest | AttachRequest | None = None
        self.prompt_scored: ScoredTokens | None = None
        self._prompt_logprobs: Logprobs | None = None
        self.is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._interval = params.stream_interval or stream_interval
        self._on_abandoned = on_abandoned
        self._error: FootplateError | None = None
        self._was_closed = False
        self._waiter: asyncio.Future[None] | None = None
        self.max_unread_tokens = max_unread_tokens
        self.notices = Notices() if notices is None else notices
        self.num_unfinished = params.n
        self.completions: list[Completion] = []
        for index in range(params.n):  # no comprehension: a closure costs as much as all of this
            self.completions.append(Completion(self, index, handle + index))

    def begin(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        make_text: Callable[[], OutputText] | None,
        decode: Callable[[int], str] | None = None,
        prior_token_ids: Sequence[int] = (),
    ) -> None:
        """Set what encoding the prompt has brought. The stream may have been aborted meanwhile.

        Args:
            prompt: None if it was given as token ids.
            make_text: for each completion; None for a stream of token ids alone.
            decode: the text of one token, for its logprobs.
            prior_token_ids: output that there is already; taken to have been handed out.
        """
        params = self.params
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        if params.prompt_logprobs is not None or params.prompt_logprob_token_ids:
            self.prompt_scored = ScoredTokens(len(params.prompt_logprob_token_ids or ()), decode)
        is_scored = params.logprobs is not None or params.logprob_token_ids
        for completion in self.completions:
            if prior_token_ids:
                completion.resume(prior_token_ids)
            if make_text is not None:
                completion.text = make_text()
            if is_scored:
                completion.scored = ScoredTokens(len(params.logprob_token_ids or ()), decode)

    # ---- pushed by the engine client

    @property
    def handle(self) -> int:
        """Of the first completion."""
        return self.completions[0].handle

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be pushed."""
        return not self.num_unfinished or self._error is not None

    def start(self, started: Started) -> None:
        """The core's report on the way to the first token."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = started.num_cached_tokens
            self.metrics.queue_time_s = started.queue_time_s
            self.metrics.prefill_time_s = started.prefill_time_s

    def push_prompt_logprobs(self, rows: LogprobRows) -> bool:
        """Take scores of the prompt, before the first token; False if some are missing."""
        return self.prompt_scored is None or self.prompt_scored.add(rows)

    def abort(self, error: FootplateError | None = None) -> None:
        """End here, with what there is so far.

        Args:
            error: raised behind the last output.
        """
        self._error = self._error or error
        for completion in self.completions:
            completion.end(FinishReason.ABORT)

    def fail(self, error: FootplateError) -> None:
        """End with an error. What has arrived before it is still handed out first."""
        if not self.is_finished:
            self._error = error
            self.wake()

    def wake(self) -> None:
        """Let the consumer look again, if one waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- taken by the consumer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; waits for it.

        Raises:
            FootplateError: the request or the engine failed; what arrived before came first.
        """
        while True:
            if due := self._due():
                return self._take(due)
            if self._error is not None and not self._was_closed:
                raise self._error
            if self._was_closed or not self.num_unfinished:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("two consumers wait for one stream: it has one output for one")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _due(self) -> Sequence[Completion]:
        if self._was_closed:
            return ()
        if self.is_final_only:
            is_complete = not self.num_unfinished and self.completions[0].is_due
            return self.completions if is_complete else ()
        if len(self.completions) == 1 and self._error is None:  # nearly every stream
            return self.completions if self.completions[0].is_due else ()
        due = [completion for completion in self.completions if completion.is_due]
        if not due and self._error is not None:
            due = [completion for completion in self.completions if completion.has_news]
        return due

    def _take(self, due: Sequence[Completion]) -> RequestOutput:
        outputs = []  # no comprehension: a closure costs more than all else here
        for completion in due:
            outputs.append(completion.take(self.params, self._interval))
        scored = self.prompt_scored
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            not self.num_unfinished,  # who had ended and was not taken was due
            self.seed,
            self.metrics,
            self.num_cached_tokens,
            None if scored is None else self._read_prompt_logprobs(scored),
        )

    def _read_prompt_logprobs(self, scored: ScoredTokens) -> Logprobs | None:
        """All of them, which have come before the first output; with `DELTA` only once."""
        taken = self._prompt_logprobs
        if taken is None:
            taken = scored.read(0, len(self.prompt_token_ids), flat=self.params.flat_logprobs)
        if self.params.output_kind is RequestOutputKind.DELTA:
            self.prompt_scored = None
        else:
            self._prompt_logprobs = taken
        return taken

    async def aclose(self) -> None:
        """Abandon the stream. If the request has not ended, the engine core is told to stop."""
        self.close()

    def close(self) -> None:
        """As `aclose`, without waiting for anything."""
        if not self.is_finished:
            self._on_abandoned(self)
        self._was_closed = True
