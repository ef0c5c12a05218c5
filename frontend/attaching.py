"""Requests that outlive their client, and how a client that has come back goes on with one.

The core tells all tokens from position 0 on, also to who has most of them: text depends on what
stands before, on characters that were cut in two, and on stop strings that had begun. So everything
goes the way that it went the first time, and what had been handed out then is not handed out again.
"""

import asyncio
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from footplate.frontend.completion import NEVER, Completion
from footplate.frontend.notices import Notices
from footplate.frontend.output_text import OutputText
from footplate.frontend.outputs import RequestMetrics
from footplate.frontend.stream import RequestStream
from footplate.protocol.bounds import MAX_REQUEST_ID_CHARS
from footplate.protocol.errors import InvalidRequestError
from footplate.protocol.messages import AddRequest, AttachRequest, FinishReason
from footplate.protocol.params import SamplingParams

# Makes the text of a completion, given its prompt and `min_tokens`.
MakeText = Callable[[list[int], int], OutputText]


def require_detachable(request_id: object, params: SamplingParams, *, has_client_key: bool) -> None:
    """Refuse what could not be kept without its client, or not be found again.

    Raises:
        InvalidRequestError: with what is missing, or too much.
    """
    if not has_client_key:
        raise InvalidRequestError(
            "a request outlives its client only if that can come back: connect with a client_key"
        )
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequestError(
            "a request that outlives its client needs a request_id of its own, of at most "
            f"{MAX_REQUEST_ID_CHARS} characters"
        )
    try:
        request_id.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the request_id holds a surrogate, which is no text") from None
    if params.n != 1:
        raise InvalidRequestError(f"n={params.n}: a request that outlives its client has n=1")
    wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    if wants_logprobs or params.logprob_token_ids or params.prompt_logprob_token_ids:
        raise InvalidRequestError(
            "a request that outlives its client has no logprobs: its tokens are all that is kept"
        )


class AttachingStream(RequestStream):
    """A stream of a request that the core has already, once it has said so.

    Args:
        params: of its text, and of how it is handed out; tokens are as the request had it.
        make_text: None for a stream of token ids alone.
        from_position: so many tokens were handed out before, to whoever was its consumer.
    """

    __slots__ = ("_answered", "_make_text")

    def __init__(
        self,
        request_id: str,
        handle: int,
        params: SamplingParams,
        make_text: MakeText | None,
        from_position: int,
        metrics: RequestMetrics,
        on_abandoned: Callable[[RequestStream], None],
        stream_interval: int = 1,
        max_unread_tokens: int | None = None,
        notices: Notices | None = None,
    ) -> None:
        super().__init__(
            request_id,
            handle,
            params,
            0,
            metrics,
            on_abandoned,
            stream_interval,
            max_unread_tokens,
            notices,
        )
        self.completions = [_Completion(self, handle, from_position, self._interval)]
        self._make_text = make_text
        self._answered = asyncio.Event()

    def attach(self, request: AddRequest, now: float) -> AddRequest:
        """The core has the request; its tokens follow.

        Args:
            request: as the core tells it.
            now: monotonic seconds.

        Returns:
            The message that would start it anew under the handle that it has here.
        """
        metrics, make_text, prompt = self.metrics, self._make_text, request.prompt_token_ids
        arrival = now - request.age_s
        metrics.arrival_time += arrival - metrics.arrival
        metrics.arrival = arrival
        self.seed = request.params.seed
        min_tokens = request.params.min_tokens
        text = None if make_text is None else lambda: make_text(prompt, min_tokens)
        self.begin(None, prompt, text)
        self._answered.set()
        # Output that it came with is told again as well, so it is none that we have.
        return replace(
            request, handle=self.handle, prior_token_ids=[], is_replay=False, run_alone=False
        )

    def wake(self) -> None:
        """Let who waits look again, for an output or for the answer."""
        self._answered.set()
        super().wake()

    async def until_attached(self) -> None:
        """Wait until the core has answered, or the request has been aborted here.

        Raises:
            FootplateError: the core does not have it, or the engine has ended.
        """
        await self._answered.wait()
        if self._error is not None and isinstance(self.sent, AttachRequest):
            raise self._error


class _Completion(Completion):
    """Hands out what lies behind a position, as if all before had been taken there."""

    __slots__ = ("_from_position", "_interval", "_is_behind")

    def __init__(
        self, stream: AttachingStream, handle: int, from_position: int, interval: int
    ) -> None:
        super().__init__(stream, 0, handle)
        self._from_position = from_position
        self._interval = interval
        self._is_behind = from_position > 0  # not all of it has come
        if not stream.is_final_only:
            self._due_at = from_position + 1

    def push(self, token_ids: Sequence[int], now: float) -> bool:
        if self._is_behind:
            num_missing = self._from_position - self.num_tokens
            if super().push(token_ids[:num_missing], now):
                return True
            if self.num_tokens < self._from_position:
                return False
            self._catch_up()
            token_ids = token_ids[num_missing:]
        return super().push(token_ids, now)

    def end(self, reason: FinishReason) -> None:
        if self._is_behind:  # whoever took the last token was told the rest, or is about to be
            self._catch_up()
        super().end(reason)

    def _catch_up(self) -> None:
        self._is_behind = False
        self.take(self.stream.params, self._interval)
        if self.stream.is_final_only:
            self._due_at = NEVER

    @property
    def has_news(self) -> bool:
        return not self._is_behind and super().has_news
