"""One call of `AsyncLLMEngine.beam_search`: how a beam becomes a request of the engine client."""

from typing import TYPE_CHECKING

from footplate.frontend.beam_search import NextTokens
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.logprobs import LogprobsOnePosition
from footplate.frontend.request_schedule import RequestSchedule
from footplate.frontend.session import Session
from footplate.frontend.stream import RequestStream
from footplate.protocol.errors import RequestFailedError
from footplate.protocol.messages import AddRequest
from footplate.protocol.params import RequestOutputKind, SamplingParams
from footplate.protocol.token_params import TokenParams

if TYPE_CHECKING:
    from collections.abc import Callable

# What its stream is to make of a beam's request; the core is told by `TokenParams`.
_ONE_SCORED_TOKEN = SamplingParams(
    logprobs=0, detokenize=False, output_kind=RequestOutputKind.DELTA, max_tokens=1
)


class BeamCall:
    """Scores beams behind one prompt, a request for each; a `ScoreBeam`.

    Args:
        request_id: those of the beams begin with it.
        abandon: tells the core of a stream that was closed before its end.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        cache_salt: str,
        schedule: RequestSchedule,
        session: Session,
        client: EngineClient,
        abandon: "Callable[[RequestStream], None]",
    ) -> None:
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._cache_salt = cache_salt
        self._schedule = schedule
        self._session = session
        self._client = client
        self._abandon = abandon

    async def __call__(self, prior_token_ids: list[int], params: TokenParams, /) -> NextTokens:
        """As `ScoreBeam`."""
        stream = self._send(prior_token_ids, params)
        scored: LogprobsOnePosition = {}
        finish_reason = None
        try:
            await self._session.has_room()
            async for output in stream:
                [completion] = output.outputs
                for position in completion.logprobs or ():
                    scored = position or {}
                finish_reason = completion.finish_reason
        finally:
            stream.close()
        if scored:
            return NextTokens(list(scored), [entry.logprob for entry in scored.values()])
        if finish_reason == "stop":
            return NextTokens(is_complete=True)
        raise RequestFailedError(
            f"beam search {self._request_id!r}: a beam's request has ended, finish reason "
            f"{finish_reason}"
        )

    def _send(self, prior_token_ids: list[int], params: TokenParams) -> RequestStream:
        handle = self._client.new_handles(1)
        stream = RequestStream(
            f"{self._request_id}-beam-{handle}",
            handle,
            _ONE_SCORED_TOKEN,
            params.seed,
            self._schedule.metrics(),
            self._abandon,
        )
        stream.begin(None, self._prompt_token_ids, None, prior_token_ids=prior_token_ids)
        self._client.open(stream)
        try:
            message = AddRequest(
                handle,
                self._prompt_token_ids,
                params,
                self._schedule.priority,
                self._cache_salt,
                prior_token_ids=prior_token_ids,
            )
            # One by one, the first would have a step of the engine for itself.
            self._session.send(message, gather=True)
        except BaseException:
            self._client.discard(stream)
            raise
        self._client.enqueue(stream, message)
        return stream
