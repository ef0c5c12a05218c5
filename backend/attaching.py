"""How requests with an id change hands: from a connection that has gone to nobody, and from there
to the next one of their session."""

from collections.abc import Callable

from footplate.backend.admission import MAX_HANDLE, RefusalError
from footplate.backend.delivery import Delivery
from footplate.backend.detached import DETACHED, Lease, Leases
from footplate.backend.live_requests import LiveRequests
from footplate.backend.request import State
from footplate.backend.scheduler import Scheduler
from footplate.protocol.messages import (
    Attached,
    AttachRequest,
    ErrorKind,
    FinishReason,
    StepOutputs,
)


class Attaching:
    """Moves requests, and ends those that nobody keeps any longer. What is kept, and for how long,
    is `Leases`' to know; that of a request which has no client is `DETACHED`'s, under its key.
    """

    def __init__(
        self,
        leases: Leases,
        live: LiveRequests,
        scheduler: Scheduler,
        delivery: Delivery,
        clock: Callable[[], float],
    ) -> None:
        self._leases = leases
        self._live = live
        self._scheduler = scheduler
        self._delivery = delivery
        self._clock = clock  # monotonic, seconds
        live.join(DETACHED)

    def detach(self, session: bytes) -> None:
        """A session's connection is gone, and it may come back: its requests with an id go on."""
        for lease in self._leases.leave(session):
            request = lease.request
            assert request is not None
            if request.client != DETACHED:  # or nobody has attached to it since
                self._move(lease, DETACHED, request.key)
                self._scheduler.resume([request])  # what nobody reads is kept now

    def _move(self, lease: Lease, client: bytes, handle: int) -> None:
        assert lease.request is not None
        self._live.remove(lease.request)
        self._leases.move(lease, client, handle)
        self._live.add(lease.request)

    def make_free(self, session: bytes, request_id: str, is_replay: bool) -> None:
        """Let a request have this id: one that has ended makes way, and so does one without a
        client for its own replay.

        Raises:
            RefusalError: the id is in use.
        """
        lease = self._leases.find(session, request_id)
        if lease is None:
            return
        request = lease.request
        if request is not None and not (is_replay and request.client == DETACHED):
            raise RefusalError(f"request_id {request_id!r} is in use by a request that goes on")
        self._leases.drop(lease)
        self.end_orphans()

    def attach(self, client: bytes, session: bytes, message: AttachRequest) -> Attached:
        """Give a client what it asks for, or tell it how that has ended.

        Returns:
            What it is to be told first: its tokens follow as outputs.

        Raises:
            RefusalError: there is nothing of this id, or no such handle.
        """
        handle = message.handle
        lease, live = self._leases.find(session, message.request_id), self._live.of(client)
        assert live is not None
        if lease is None or handle in live or not 0 <= handle <= MAX_HANDLE:
            raise RefusalError(
                f"this session has no request of the id {message.request_id!r}: it was not sent, "
                "it was aborted, or its lease has expired",
                ErrorKind.LOST,
            )
        request = lease.request
        if request is not None:
            old_client, old_handle = request.client, request.handle
            self._move(lease, client, handle)
            if old_client != DETACHED:  # it asks for what it has, and gets it under one name
                self._delivery.end(old_client, old_handle, FinishReason.ABORT)
            self._scheduler.resume([request])
        answer = Attached(handle, lease.message(self._clock()))
        self._delivery.tell_again(client, handle, lease.output(), lease.started)
        if (end := lease.end) is not None:
            self._leases.on_answer(lease, client, handle)
            self._delivery.end(client, handle, end.reason, end.message, end.kind)
        return answer

    # ---- what nobody keeps

    def expire(self, now: float) -> None:
        """End what has been kept for long enough."""
        self._leases.expire(now)
        self.end_orphans()
        self.forget_sessions()

    def end_orphans(self) -> None:
        """End requests that have no client and are kept no longer."""
        for request in self._leases.take_orphans():
            if request.state is not State.FINISHED:
                self._live.finish(request, FinishReason.ABORT)

    def forget_sessions(self) -> None:
        """Nobody has the share of sessions of which nothing is left."""
        for session in self._leases.take_gone():
            self._scheduler.forget(session)

    # ---- what nobody is told

    def keep_own(self, outputs: list[tuple[bytes, StepOutputs]]) -> list[tuple[bytes, StepOutputs]]:
        """Count what requests without a client have produced; what is left is for the others."""
        if not self._live.of(DETACHED) and all(client != DETACHED for client, _ in outputs):
            return outputs
        for client, output in outputs:
            if client == DETACHED:
                self._leases.count_tokens(output.handles)
        self.end_orphans()
        return [(client, output) for client, output in outputs if client != DETACHED]
