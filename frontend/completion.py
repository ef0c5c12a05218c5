"""One completion of a request: its tokens, its text, its logprobs, its end."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from footplate.frontend.logprobs import Logprobs, ScoredTokens
from footplate.frontend.output_text import OutputText
from footplate.frontend.outputs import CompletionOutput, WeightsVersions
from footplate.protocol.messages import Finished, FinishReason, LogprobRows
from footplate.protocol.params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from footplate.frontend.stream import RequestStream

NEVER = sys.maxsize


class Completion:
    """Owns all that the client knows of one handle. The engine client pushes; the stream it is
    part of takes.

    What has arrived and has not been taken is merged into the next output. When that is more than
    the stream's `max_unread_tokens`, and an output is due, the core is asked to park the request
    until the consumer has taken it: a slow consumer costs no more memory than that. One that wants
    nothing but the end has nothing to take before. Text is made when it is taken, or at arrival if
    a stop string could end the completion there.

    It and its stream know each other, a cycle that only the collector could free: for as long as
    it is live, therefore, and no longer. The engine client cuts the tie with `forget_stream`.
    """

    __slots__ = (
        "_due_at",
        "_finish_reason",
        "_look_at",
        "_max_unread",
        "_num_taken",
        "_seen_text",
        "_stop_reason",
        "_token_ids",
        "handle",
        "index",
        "is_parked",
        "is_waiting",
        "scored",
        "stream",
        "text",
        "weights_versions",
    )

    def __init__(self, stream: "RequestStream", index: int, handle: int) -> None:
        """Args:
        stream: the request that it is part of.
        index: which of the request's completions.
        """
        self.stream = stream
        self.index = index
        self.handle = handle
        self.text: OutputText | None = None  # set when the prompt has been encoded
        self.scored: ScoredTokens | None = None  # likewise, if logprobs were asked for
        self.is_waiting = False  # sent, and not started
        self.weights_versions: WeightsVersions = ()
        # How many tokens there must be for an output: the first and the end have one of their own.
        # `NEVER` when the last has been taken, and where only that one is wanted.
        self._due_at = NEVER if stream.is_final_only else 1
        self.is_parked = False
        self._max_unread = NEVER if stream.is_final_only else stream.max_unread_tokens or NEVER
        self._look_at = self._max_unread  # up to here too few are unread for a closer look
        self._token_ids: list[int] = []
        self._num_taken = 0
        self._seen_text = ""
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    def resume(self, prior_token_ids: Sequence[int]) -> None:
        """Begin behind output that there is already."""
        self._token_ids = list(prior_token_ids)
        self._num_taken = len(prior_token_ids)
        if self._due_at == 1:  # it has not been aborted, and is not one output for all
            self._due_at += len(prior_token_ids)

    # ---- pushed

    @property
    def num_tokens(self) -> int:
        """Output tokens received; the next one has this position."""
        return len(self._token_ids)

    def copy_token_ids(self) -> list[int]:
        """Output tokens received."""
        return self._token_ids.copy()

    def note_weights(self, version: str) -> None:
        """What comes from here on is made by weights of this name."""
        position, versions = len(self._token_ids), self.weights_versions
        if versions and versions[-1][0] == position:
            versions = versions[:-1]
        if not versions or versions[-1][1] != version:
            self.weights_versions = (*versions, (position, version))

    def push(self, token_ids: Sequence[int], now: float) -> bool:
        """Take tokens that follow those received so far; True if a stop string ended it.

        Tokens behind the one that completed a stop string are dropped.

        Raises:
            ValueError: their logprobs have not come.
            Exception: whatever a tokenizer raises.
        """
        metrics = self.stream.metrics
        if metrics.first_token is None:
            metrics.first_token = now
        metrics.last_token = now
        scored = self.scored
        if scored is not None and scored.end < len(self._token_ids) + len(token_ids):
            raise ValueError(f"token {scored.end} came without its logprobs")
        self._token_ids += token_ids
        text = self.text
        if text is not None and text.looks_for_stops and text.reach_stop(self._token_ids):
            del self._token_ids[text.num_tokens :]
            self._stop_reason = text.stop
            self.end(FinishReason.STOP)
            return True
        num_tokens = len(self._token_ids)
        if num_tokens >= self._due_at:
            self.stream.wake()
            if num_tokens > self._look_at:
                self._look_at_unread(num_tokens)
        return False

    def _look_at_unread(self, num_tokens: int) -> None:
        # An output came due with `_due_at`, so there has been something to read.
        limit = max(self._num_taken + self._max_unread, self._due_at)
        if num_tokens <= limit:
            self._look_at = limit
        elif not self.is_parked:
            self.is_parked = True
            self.stream.notices.park(self.handle)

    def push_logprobs(self, rows: LogprobRows) -> bool:
        """Take what belongs to tokens that are about to be pushed; False if some are missing.

        Raises:
            ValueError: the columns do not fit together.
        """
        if self.scored is None:
            return True
        next_position = max(len(self._token_ids), self.scored.end)
        return rows.position <= next_position and self.scored.add(rows)

    def finish(self, finished: Finished) -> None:
        """The core's last word on this handle."""
        if self._finish_reason is None:
            if finished.reason is FinishReason.STOP and self._token_ids[-1:]:
                last, own_stops = self._token_ids[-1], self.stream.params.stop_token_ids or ()
                self._stop_reason = last if last in own_stops else None
            self.end(finished.reason)

    def end(self, reason: FinishReason) -> None:
        """End here, with what there is so far. Only the first end counts."""
        if self._finish_reason is None:
            self._finish_reason = reason
            self._due_at = 0
            self.stream.num_unfinished -= 1
            self.stream.wake()

    def forget_stream(self) -> None:
        """Nothing more will be pushed."""
        self.is_parked = False
        del self.stream

    # ---- taken

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be pushed."""
        return self._finish_reason is not None

    @property
    def is_due(self) -> bool:
        """Whether it is time for an output."""
        return len(self._token_ids) >= self._due_at

    @property
    def has_news(self) -> bool:
        """Whether there is anything that has not been taken."""
        return len(self._token_ids) > self._num_taken

    def take(self, params: SamplingParams, interval: int) -> CompletionOutput:
        """The output that is due, or all that is there; the next is due `interval` tokens on."""
        reason = self._finish_reason
        delta = ""
        if self.text is not None:
            delta = self.text.take(self._token_ids, is_over=reason is not None)
        num_tokens = len(self._token_ids)
        if params.output_kind is RequestOutputKind.DELTA:
            start, token_ids, text = self._num_taken, self._token_ids[self._num_taken :], delta
        else:
            self._seen_text += delta
            start, token_ids, text = 0, self._token_ids.copy(), self._seen_text
        self._num_taken = num_tokens
        self._due_at = NEVER if reason is not None else num_tokens + interval
        if self.is_parked:
            self.is_parked = False
            self.stream.notices.resume(self.handle)
        logprobs: Logprobs | None = None
        cumulative: float | None = None
        if self.scored is not None:
            logprobs = self.scored.read(start, num_tokens, flat=params.flat_logprobs)
            cumulative = self.scored.cumulative_up_to(num_tokens)
        return CompletionOutput(
            self.index,
            text,
            token_ids,
            None if reason is None else str(reason),
            self._stop_reason,
            logprobs,
            cumulative,
            self.weights_versions,
        )
