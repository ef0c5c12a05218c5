"""Turns step outputs into one stream per request. No sockets, no clock of its own, no tasks."""

import logging
from collections.abc import Iterable

from footplate.frontend.admission import WaitingRequests
from footplate.frontend.attaching import AttachingStream
from footplate.frontend.completion import Completion
from footplate.frontend.notices import Notices
from footplate.frontend.outputs import WeightsVersions
from footplate.frontend.replay import continuation
from footplate.frontend.stream import RequestStream
from footplate.protocol.errors import (
    DuplicateRequestError,
    EngineDrainingError,
    FootplateError,
    QueueOverflowError,
    RequestFailedError,
    RequestLostError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
    AttachRequest,
    ErrorKind,
    Finished,
    FinishReason,
    LogprobRows,
    Started,
    StepOutputs,
)

logger = logging.getLogger(__name__)

NOTHING_KEPT = (
    "nothing of this id is kept: it was not sent with this client key, it was aborted, its lease "
    "has expired, or the engine core was replaced meanwhile"
)


class EngineClient:
    """Owns the live streams, by request id, and their completions, by handle. Knows nothing of
    scheduling or memory: the engine core alone decides what runs.

    Attributes:
        waiting: the requests that have been sent and have not started.
        notices: what the core is to be told about handles, beside what methods return.
    """

    def __init__(self) -> None:
        self._by_handle: dict[int, Completion] = {}
        self._by_request_id: dict[str, RequestStream] = {}
        self._num_handles = 0
        self._weights_versions: WeightsVersions = ((0, ""),)
        self.waiting = WaitingRequests()
        self.notices = Notices()

    @property
    def num_live(self) -> int:
        """Streams that have not ended."""
        return len(self._by_request_id)

    def new_handles(self, count: int) -> int:
        """The first of `count` consecutive numbers that no request of this session has had."""
        first = self._num_handles + 1
        self._num_handles += count
        return first

    def require_unused(self, request_id: str) -> None:
        """Raise DuplicateRequestError if a live request has this id."""
        if request_id in self._by_request_id:
            raise DuplicateRequestError(
                f"request id {request_id!r} is in use by a live request: choose another, or abort "
                "that one first"
            )

    def open(self, stream: RequestStream) -> None:
        """Expect outputs for this stream from now on."""
        self.require_unused(stream.request_id)
        self._by_request_id[stream.request_id] = stream
        for completion in stream.completions:
            completion.weights_versions = self._weights_versions
            self._by_handle[completion.handle] = completion

    def ask_for(self, stream: AttachingStream) -> AttachRequest:
        """The question for a request that the core has already; its stream is open."""
        stream.sent = AttachRequest(stream.handle, stream.request_id)
        return stream.sent

    def attach(self, attached: Attached, now: float) -> list[int]:
        """The core has what was asked for. From here on it is a request like any other.

        Returns:
            See `handle`.
        """
        over: list[int] = []
        completion = self._by_handle.get(attached.handle)
        if completion is None:
            return over  # nobody waits for it any longer
        stream = completion.stream
        if isinstance(stream, AttachingStream) and isinstance(stream.sent, AttachRequest):
            try:
                self.enqueue(stream, stream.attach(attached.request, now))
            except Exception as error:
                self._on_unusable(completion, error, over)
        return over

    def note_weights(self, version: str) -> None:
        """All tokens to come are made by weights of this name."""
        self._weights_versions = ((0, version),)
        for completion in self._by_handle.values():
            completion.note_weights(version)

    def enqueue(self, stream: RequestStream, message: AddRequest) -> None:
        """Its request is on its way: it waits from now on."""
        stream.sent = message
        stream.num_queued_tokens = len(stream.prompt_token_ids)
        self.waiting.enter(len(stream.completions), stream.num_queued_tokens)
        for completion in stream.completions:
            completion.is_waiting = True

    def replay(self, now: float) -> list[AddRequest | AttachRequest]:
        """What to send to another core, so that every live request goes on in it.

        Those that nobody reads are parked there as well: it is noted, to be taken when all this has
        been sent.

        Args:
            now: monotonic seconds.
        """
        self.notices.take()  # they were about another core's requests
        for completion in self._by_handle.values():
            if completion.is_parked:
                self.notices.park(completion.handle)
        streams = self._by_request_id.values()
        return [message for stream in streams for message in continuation(stream, now)]

    def is_live(self, handle: int) -> bool:
        """Whether outputs are expected for this handle."""
        return handle in self._by_handle

    def num_tokens(self, handle: int) -> int:
        """Output tokens of a live handle so far."""
        return self._by_handle[handle].num_tokens

    def request_id(self, handle: int) -> str:
        """The request that a live handle is part of."""
        return self._by_handle[handle].stream.request_id

    def fail(self, handle: int, error: RequestFailedError) -> None:
        """End the whole request that a live handle is part of. The core has not heard of it, or
        is not to hear of it again."""
        stream = self._by_handle[handle].stream
        stream.fail(RequestFailedError(f"request {stream.request_id!r}: {error}"))
        self._forget(stream)

    def discard(self, stream: RequestStream) -> None:
        """Take back `open`: its request has never been sent."""
        self._forget(stream)

    def handle(self, outputs: StepOutputs, now: float) -> list[int]:
        """Give every stream what is new for it, received at `now` (monotonic seconds).

        Returns:
            Handles that the core need not go on with: they have ended here. What it is to keep
            all the same is noted.

        Raises:
            ValueError: the columns do not fit together.
        """
        by_handle = self._by_handle
        over: list[int] = []
        for started in outputs.started:
            self._start(started, now)
        for rows in outputs.prompt_logprobs:
            if (completion := by_handle.get(rows.handle)) is not None:
                stream = completion.stream
                if not stream.push_prompt_logprobs(rows):
                    scored = stream.prompt_scored
                    assert scored is not None, "whoever wants none misses none"
                    self._on_gap(completion, scored.end, rows.position, over)
        for rows in outputs.logprobs:
            self._push_logprobs(rows, over)
        if not outputs.counts:
            for handle, position, token_id in zip(
                outputs.handles, outputs.positions, outputs.token_ids, strict=True
            ):
                completion = by_handle.get(handle)
                if completion is not None:
                    if position != completion.num_tokens:
                        self._on_wrong_position(completion, position, over)
                        continue
                    try:
                        if completion.push((token_id,), now):
                            self._close(completion, over)
                    except Exception as error:
                        self._on_unusable(completion, error, over)
        else:
            self._handle_runs(outputs, now, over)
        for finished in outputs.finished:
            self._finish(finished, over)
        return over

    def _handle_runs(self, outputs: StepOutputs, now: float, over: list[int]) -> None:
        start = 0
        for handle, position, count in zip(
            outputs.handles, outputs.positions, outputs.counts, strict=True
        ):
            run = outputs.token_ids[start : start + count]
            start += count
            completion = self._by_handle.get(handle)
            if completion is None:
                continue
            num_known = completion.num_tokens - position
            if num_known < 0:
                self._on_wrong_position(completion, position, over)
            elif num_known < count:
                try:
                    if completion.push(run[num_known:], now):
                        self._close(completion, over)
                except Exception as error:
                    self._on_unusable(completion, error, over)

    def _push_logprobs(self, rows: LogprobRows, over: list[int]) -> None:
        completion = self._by_handle.get(rows.handle)
        if completion is not None and not completion.push_logprobs(rows):
            self._on_gap(completion, completion.num_tokens, rows.position, over)

    def _on_unusable(self, completion: Completion, error: Exception, over: list[int]) -> None:
        # Whatever a tokenizer raises for one request must not cost the others their tokens.
        request_id = completion.stream.request_id
        logger.error("request %s: its output cannot be used", request_id, exc_info=error)
        why = RequestFailedError(f"request {request_id!r}: its output is of no use: {error!r}")
        self._fail(completion, why, over)

    def _on_wrong_position(self, completion: Completion, position: int, over: list[int]) -> None:
        if position >= completion.num_tokens:  # otherwise it has been seen before
            self._on_gap(completion, completion.num_tokens, position, over)

    def _on_gap(self, completion: Completion, expected: int, came: int, over: list[int]) -> None:
        # Tokens in between were lost. A stream with a hole is worse than one that ends.
        request_id = completion.stream.request_id
        why = RequestFailedError(
            f"request {request_id!r}: token {expected} is missing, {came} came"
        )
        self._fail(completion, why, over)

    def _fail(self, completion: Completion, error: FootplateError, over: list[int]) -> None:
        """End the whole request that a completion is part of."""
        stream = completion.stream
        stream.fail(error)
        over += self._forget(stream)

    def _start(self, started: Started, now: float) -> None:
        if completion := self._by_handle.get(started.handle):
            stream = completion.stream
            stream.start(started)
            if completion.is_waiting:
                completion.is_waiting = False
                # The prompt is counted once, with the first completion that starts.
                self.waiting.start(stream.num_queued_tokens, now)
                stream.num_queued_tokens = 0

    def _finish(self, finished: Finished, over: list[int]) -> None:
        # Unknown handles are ours too: the completion has ended here before the core knew.
        completion = self._by_handle.get(finished.handle)
        if completion is None:
            return
        stream = completion.stream
        completion.finish(finished)
        self._forget_completion(completion)
        if finished.reason is FinishReason.ERROR:
            # Its siblings are no use to a consumer that gets an exception.
            stream.abort(self._error_of(stream, finished))
            over += self._forget(stream)
        elif stream.is_finished:
            del self._by_request_id[stream.request_id]

    def _error_of(self, stream: RequestStream, finished: Finished) -> FootplateError:
        if finished.kind is ErrorKind.OVERFLOW:
            return QueueOverflowError(finished.message, self.waiting.estimate_retry_s())
        if finished.kind is ErrorKind.DRAINING:
            return EngineDrainingError(finished.message)
        if finished.kind is ErrorKind.LOST:
            return RequestLostError(f"request {stream.request_id!r}: {NOTHING_KEPT}")
        return RequestFailedError(f"request {stream.request_id!r}: {finished.message}")

    def abort(self, request_ids: Iterable[str]) -> AbortRequests | None:
        """End these streams with what there is so far; unknown ids are no error.

        Returns:
            What to tell the core, if anything.
        """
        handles: list[int] = []
        for request_id in request_ids:
            if stream := self._by_request_id.get(request_id):
                stream.abort()
                handles += self._forget(stream)
        return AbortRequests(handles) if handles else None

    def fail_all(self, error: FootplateError) -> None:
        """End every stream with this error."""
        for stream in list(self._by_request_id.values()):
            stream.fail(error)
            self._forget(stream)

    def _close(self, completion: Completion, over: list[int]) -> None:
        """A stop string has ended a completion."""
        stream = completion.stream
        if isinstance(stream.sent, AddRequest) and stream.sent.request_id is not None:
            self.notices.end(completion.handle)  # it can be attached to, as what has ended
        else:
            over.append(completion.handle)
        self._forget_completion(completion)
        if stream.is_finished:
            del self._by_request_id[stream.request_id]

    def _forget(self, stream: RequestStream) -> list[int]:
        """Expect nothing more; the handles that were still live."""
        live = [c for c in stream.completions if self._by_handle.get(c.handle) is c]
        for completion in live:
            self._forget_completion(completion)
        if self._by_request_id.get(stream.request_id) is stream:
            del self._by_request_id[stream.request_id]
        return [completion.handle for completion in live]

    def _forget_completion(self, completion: Completion) -> None:
        del self._by_handle[completion.handle]
        if completion.is_waiting:
            completion.is_waiting = False
            stream = completion.stream
            self.waiting.leave(1, stream.num_queued_tokens)
            stream.num_queued_tokens = 0
        completion.forget_stream()
