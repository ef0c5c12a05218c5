"""One request as its consumer sees it: an async iterator that holds at most one pending output."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from footplate.frontend.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
)
from footplate.protocol.errors import FootplateError, RequestFailedError
from footplate.protocol.messages import Finished, FinishReason, Started
from footplate.protocol.params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from footplate.frontend.text import Detokenizer, StopStrings


class RequestStream:
    """Owns all that the client knows of one live request: its tokens, its text, its end.

    The engine client pushes; one consumer iterates. What has arrived and has not been taken is
    merged into the next output, so a slow consumer costs no memory beyond its own tokens.

    Text is made when it is needed: at arrival if a stop string could end the request there,
    else when the consumer takes an output.
    """

    __slots__ = (
        "_delta_text",
        "_detokenizer",
        "_error",
        "_final_taken",
        "_finish_reason",
        "_kind",
        "_num_detokenized",
        "_num_taken",
        "_on_abandoned",
        "_stop_reason",
        "_stops",
        "_text",
        "_token_ids",
        "_waiter",
        "handle",
        "metrics",
        "num_cached_tokens",
        "params",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "seed",
    )

    def __init__(
        self,
        request_id: str,
        handle: int,
        params: SamplingParams,
        seed: int,
        metrics: RequestMetrics,
        on_abandoned: Callable[["RequestStream"], None],
    ) -> None:
        """Open a stream; `begin` says what it is about.

        Args:
            on_abandoned: called when the consumer closes the stream before its end.
        """
        self.request_id = request_id
        self.handle = handle
        self.prompt: str | None = None
        self.prompt_token_ids: list[int] = []
        self.params = params
        self.seed = seed
        self.metrics = metrics
        self.num_cached_tokens: int | None = None
        self._kind = params.output_kind
        self._detokenizer: Detokenizer | None = None
        self._stops: StopStrings | None = None
        self._on_abandoned = on_abandoned
        self._token_ids: list[int] = []
        self._num_detokenized = 0
        self._num_taken = 0
        self._text = ""
        self._delta_text = ""
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._error: FootplateError | None = None
        self._final_taken = False
        self._waiter: asyncio.Future[None] | None = None

    def begin(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        detokenizer: "Detokenizer | None",
        stops: "StopStrings | None",
    ) -> None:
        """Set what encoding the prompt has brought. The stream may have been aborted meanwhile.

        Args:
            prompt: None if it was given as token ids.
            detokenizer: None for a stream of token ids alone.
            stops: None without stop strings.
        """
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._detokenizer = detokenizer
        self._stops = stops

    # ---- pushed by the engine client

    @property
    def num_tokens(self) -> int:
        """Output tokens received; the next one has this position."""
        return len(self._token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be pushed."""
        return self._finish_reason is not None or self._error is not None

    def push(self, token_ids: Sequence[int], now: float) -> bool:
        """Take tokens that follow those received so far; True if a stop string ended the stream.

        Tokens behind the one that completed a stop string are dropped.
        """
        metrics = self.metrics
        if metrics.first_token is None:
            metrics.first_token = now
        metrics.last_token = now
        self._token_ids += token_ids
        if self._stops is not None and self._advance_until_stop():
            self._end(FinishReason.STOP)
            return True
        if self._waiter is not None and self._kind is not RequestOutputKind.FINAL_ONLY:
            self._wake()
        return False

    def start(self, started: Started) -> None:
        """The core's report on the way to the first token."""
        self.num_cached_tokens = started.num_cached_tokens
        self.metrics.queue_time_s = started.queue_time_s
        self.metrics.prefill_time_s = started.prefill_time_s

    def finish(self, finished: Finished) -> None:
        """The core's last word on this request."""
        if finished.reason is FinishReason.ERROR:
            self._error = RequestFailedError(f"request {self.request_id!r}: {finished.message}")
            self._finish_reason = FinishReason.ERROR  # one last output, then the error
            self._wake()
            return
        own_stops = self.params.stop_token_ids or ()
        if finished.reason is FinishReason.STOP and self._token_ids[-1] in own_stops:
            self._stop_reason = self._token_ids[-1]
        self._end(finished.reason)

    def abort(self) -> None:
        """End here, with what there is so far."""
        self._end(FinishReason.ABORT)

    def fail(self, error: FootplateError) -> None:
        """End with an error. What has arrived before it is still handed out first."""
        if not self.is_finished:
            self._error = error
            self._wake()

    def _end(self, reason: FinishReason) -> None:
        if not self.is_finished:
            self._finish_reason = reason
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- text

    def _advance_until_stop(self) -> bool:
        """Detokenize one by one, so that the stream ends with the token that completed a stop."""
        assert self._detokenizer is not None and self._stops is not None
        min_tokens = self.params.min_tokens
        while self._num_detokenized < len(self._token_ids):
            token_id = self._token_ids[self._num_detokenized]
            self._num_detokenized += 1
            delta = self._detokenizer.feed((token_id,))
            if self._num_detokenized <= min_tokens:
                self._delta_text += delta
                continue
            shown, stop = self._stops.feed(delta)
            self._delta_text += shown
            if stop is not None:
                self._stop_reason = stop
                del self._token_ids[self._num_detokenized :]
                return True
        return False

    def _advance_text(self) -> None:
        if self._detokenizer is None:
            return
        if self._num_detokenized < len(self._token_ids):
            fresh = self._token_ids[self._num_detokenized :]
            self._num_detokenized = len(self._token_ids)
            self._delta_text += self._detokenizer.feed(fresh)
        if self._finish_reason is not None and not isinstance(self._stop_reason, str):
            rest = self._detokenizer.finish()
            if self._stops is not None:
                rest = self._stops.feed(rest)[0] + self._stops.finish()
            self._delta_text += rest

    # ---- taken by the consumer

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; waits for it.

        Raises:
            FootplateError: the request or the engine failed; what arrived before came first.
        """
        while True:
            if self._has_output():
                return self._take()
            if self._error is not None:
                self._final_taken = True
                raise self._error
            if self._final_taken:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError("two consumers wait for one stream: it has one output for one")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _has_output(self) -> bool:
        if self._final_taken:
            return False
        if self._finish_reason is not None:
            return True
        return (
            self._kind is not RequestOutputKind.FINAL_ONLY
            and len(self._token_ids) > self._num_taken
        )

    def _take(self) -> RequestOutput:
        self._advance_text()
        finish_reason = self._finish_reason
        if self._kind is RequestOutputKind.DELTA:
            token_ids = self._token_ids[self._num_taken :]
            text = self._delta_text
        else:
            self._text += self._delta_text
            token_ids = self._token_ids.copy()
            text = self._text
        self._delta_text = ""
        self._num_taken = len(self._token_ids)
        self._final_taken = finish_reason is not None
        completion = CompletionOutput(
            0,
            text,
            token_ids,
            None if finish_reason is None else str(finish_reason),
            self._stop_reason,
        )
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [completion],
            self._final_taken,
            self.seed,
            self.metrics,
            self.num_cached_tokens,
        )

    async def aclose(self) -> None:
        """Abandon the stream. If the request has not ended, the engine core is told to stop."""
        self.close()

    def close(self) -> None:
        """As `aclose`, without waiting for anything."""
        if not self.is_finished:
            self._on_abandoned(self)
        self._final_taken = True
