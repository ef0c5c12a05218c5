"""What a step has brought, told to the clients that it concerns."""

import logging
from collections.abc import Callable, Iterable

from footplate.backend.delivery import Delivery
from footplate.backend.detached import Leases
from footplate.backend.live_requests import LiveRequests
from footplate.backend.request import Request
from footplate.backend.step import StepPlan, StepResult, failures, produced
from footplate.protocol.messages import FinishReason, Started

logger = logging.getLogger(__name__)


class Telling:
    """Writes tokens, logprobs and ends to the delivery, in the order that clients rely on: scores
    of a prompt before its first token, and ends behind all tokens.

    Attributes:
        num_generation_tokens: told so far.
        num_corrupted_requests: that have ended because their logits were no distribution.
    """

    def __init__(
        self,
        live: LiveRequests,
        leases: Leases,
        delivery: Delivery,
        clock: Callable[[], float],
    ) -> None:
        self.num_generation_tokens = 0
        self.num_corrupted_requests = 0
        self._live = live
        self._leases = leases
        self._delivery = delivery
        self._clock = clock  # monotonic, seconds

    def tell(self, plan: StepPlan, result: StepResult, finished: Iterable[Request]) -> None:
        """Tell of one step, which the scheduler knows of already.

        Args:
            finished: who has come to an end of its own in it.
        """
        for index, rows in result.prompt_logprobs.items():
            request = plan.requests[index]
            self._delivery.score_prompt(request.client, request.handle, rows)
        self._tell_tokens(plan, result)
        for request, error in failures(plan, result):
            logger.info("request %d failed: %s", request.handle, error.message)
            self.num_corrupted_requests += error.is_corrupted
            self._live.tell_end(request, FinishReason.ERROR, error.message, error.kind)
        for request in finished:
            assert request.finish_reason is not None
            self._live.tell_end(request, request.finish_reason)

    def _tell_tokens(self, plan: StepPlan, result: StepResult) -> None:
        now = self._clock()
        pairs = produced(plan, result)
        self.num_generation_tokens += len(pairs)
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
