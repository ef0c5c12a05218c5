"""Turns step outputs into one stream per request. No sockets, no clock of its own, no tasks."""

import logging
from collections.abc import Iterable

from footplate.frontend.stream import RequestStream
from footplate.protocol.errors import DuplicateRequestError, FootplateError, RequestFailedError
from footplate.protocol.messages import AbortRequests, Finished, Started, StepOutputs

logger = logging.getLogger(__name__)


class EngineClient:
    """Owns the live streams, by handle and by request id. Knows nothing of scheduling or memory:
    the engine core alone decides what runs."""

    def __init__(self) -> None:
        self._by_handle: dict[int, RequestStream] = {}
        self._by_request_id: dict[str, RequestStream] = {}
        self._num_handles = 0

    @property
    def num_live(self) -> int:
        """Streams that have not ended."""
        return len(self._by_handle)

    def new_handle(self) -> int:
        """A number that no request of this session has had."""
        self._num_handles += 1
        return self._num_handles

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
        self._by_handle[stream.handle] = stream

    def discard(self, stream: RequestStream) -> None:
        """Take back `open`: its request has never been sent."""
        if self._by_handle.get(stream.handle) is stream:
            self._forget(stream)

    def handle(self, outputs: StepOutputs, now: float) -> list[int]:
        """Give every stream what is new for it, received at `now` (monotonic seconds).

        Returns:
            Handles that the core need not go on with: their stream has ended here.

        Raises:
            ValueError: the columns do not fit together.
        """
        by_handle = self._by_handle
        over: list[int] = []
        for started in outputs.started:
            self._start(started)
        if not outputs.counts:
            for handle, position, token_id in zip(
                outputs.handles, outputs.positions, outputs.token_ids, strict=True
            ):
                stream = by_handle.get(handle)
                if stream is not None:
                    if position != stream.num_tokens:
                        self._on_wrong_position(stream, position, over)
                        continue
                    try:
                        if stream.push((token_id,), now):
                            self._close(stream, over)
                    except Exception as error:
                        self._on_no_text(stream, error, over)
        else:
            self._handle_runs(outputs, now, over)
        for finished in outputs.finished:
            self._finish(finished)
        return over

    def _handle_runs(self, outputs: StepOutputs, now: float, over: list[int]) -> None:
        start = 0
        for handle, position, count in zip(
            outputs.handles, outputs.positions, outputs.counts, strict=True
        ):
            run = outputs.token_ids[start : start + count]
            start += count
            stream = self._by_handle.get(handle)
            if stream is None:
                continue
            num_known = stream.num_tokens - position
            if num_known < 0:
                self._on_wrong_position(stream, position, over)
            elif num_known < count:
                try:
                    if stream.push(run[num_known:], now):
                        self._close(stream, over)
                except Exception as error:
                    self._on_no_text(stream, error, over)

    def _on_no_text(self, stream: RequestStream, error: Exception, over: list[int]) -> None:
        # Whatever a tokenizer raises for one request must not cost the others their tokens.
        logger.error("request %s: its text cannot be made", stream.request_id, exc_info=error)
        stream.fail(RequestFailedError(f"request {stream.request_id!r}: no text for it: {error!r}"))
        self._close(stream, over)

    def _on_wrong_position(self, stream: RequestStream, position: int, over: list[int]) -> None:
        if position < stream.num_tokens:
            return  # seen before
        # Tokens in between were lost. A stream with a hole is worse than one that ends.
        expected = stream.num_tokens
        stream.fail(
            RequestFailedError(
                f"request {stream.request_id!r}: token {expected} is missing, {position} came"
            )
        )
        self._close(stream, over)

    def _start(self, started: Started) -> None:
        if stream := self._by_handle.get(started.handle):
            stream.start(started)

    def _finish(self, finished: Finished) -> None:
        # Unknown handles are ours too: the stream has ended here before the core knew.
        if stream := self._by_handle.get(finished.handle):
            stream.finish(finished)
            self._forget(stream)

    def abort(self, request_ids: Iterable[str]) -> AbortRequests | None:
        """End these streams with what there is so far; unknown ids are no error.

        Returns:
            What to tell the core, if anything.
        """
        handles: list[int] = []
        for request_id in request_ids:
            if stream := self._by_request_id.get(request_id):
                stream.abort()
                self._close(stream, handles)
        return AbortRequests(handles) if handles else None

    def fail_all(self, error: FootplateError) -> None:
        """End every stream with this error."""
        for stream in list(self._by_handle.values()):
            stream.fail(error)
            self._forget(stream)

    def _close(self, stream: RequestStream, over: list[int]) -> None:
        over.append(stream.handle)
        self._forget(stream)

    def _forget(self, stream: RequestStream) -> None:
        del self._by_handle[stream.handle]
        del self._by_request_id[stream.request_id]
