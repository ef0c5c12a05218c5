"""The client object: an LLM engine as an asyncio application sees it."""

import math
import random
from collections.abc import AsyncGenerator, Iterable
from types import TracebackType
from typing import Self

from footplate.frontend.attaching import AttachingStream, require_detachable
from footplate.frontend.beam_call import BeamCall
from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.beam_request import RequestScorer, as_completions, run_beam_search
from footplate.frontend.beam_search import BeamSearch
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_state import EngineState
from footplate.frontend.health import Health
from footplate.frontend.link_keys import keys_to_connect
from footplate.frontend.outputs import RequestOutput
from footplate.frontend.prompts import Prompt, parse_prompt, resolve_max_tokens
from footplate.frontend.request_preparation import RequestPreparation
from footplate.frontend.request_schedule import RequestSchedule
from footplate.frontend.session import ProgressCallback, Session
from footplate.frontend.stream import RequestStream
from footplate.frontend.succession import RestartCallback
from footplate.frontend.supervisor import Supervisor
from footplate.frontend.text import Tokenizer
from footplate.protocol.bounds import MAX_INT, require_bool, require_int, require_number
from footplate.protocol.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    InvalidParameterError,
    InvalidRequestError,
)
from footplate.protocol.links import default_address, session_of
from footplate.protocol.messages import (
    GetStats,
    Limits,
    ModelFacts,
    ResetPrefixCache,
    Stats,
)
from footplate.protocol.params import SamplingParams

CONNECT_TIMEOUT_S = 30.0


def require_sampling_params(params: object) -> None:
    """Raise InvalidRequestError unless `params` are `SamplingParams`."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(
            f"sampling params must be SamplingParams, got {type(params).__name__}"
        )


class AsyncLLMEngine:
    """Holds one stream per request, over an engine core in another process.

    Owns the way from a prompt to a stream; its `Session` owns the life of the engine. Use from
    one event loop at a time. Starts by itself at the first request; constructing needs no
    running loop. After `shutdown` requests are refused until it is started again by `start`.

        async with AsyncLLMEngine.from_engine_args(EngineArgs(model="demo")) as engine:
            async for output in engine.generate("The function returns"):
                print(output.outputs[0].text)
    """

    def __init__(
        self,
        engine_args: EngineArgs | None = None,
        *,
        address: str | None = None,
        key_file: str | None = None,
        insecure_tcp: bool = False,
        client_key: str | None = None,
        tokenizer: str | None = None,
        start_timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,
        on_restart: RestartCallback | None = None,
    ) -> None:
        """See `from_engine_args` and `connect`, which say what goes together."""
        args = engine_args or EngineArgs()
        keys = None if address is None else keys_to_connect(address, key_file, insecure_tcp)
        if client_key is not None and address is None:
            raise InvalidRequestError(
                "client_key is for engines at an address: one with a core of its own dies with its "
                "process, and nothing outlives it"
            )
        self._has_client_key = client_key is not None
        self._client = EngineClient()
        self._session = Session(
            self._client,
            Supervisor(args) if address is None else None,
            address,
            args.start_timeout_s if start_timeout_s is None else start_timeout_s,
            keys=keys,
            patience=args.patience,
            name=None if client_key is None else session_of(client_key),
            on_progress=on_progress,
            on_restart=on_restart,
        )
        self._preparation = RequestPreparation(self._session, tokenizer or args.tokenizer)
        self._random = random.Random()

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        on_restart: RestartCallback | None = None,
    ) -> Self:
        """An engine with a core process of its own. When that dies or hangs, another takes its
        place, and every stream goes on where it was.

        Args:
            on_progress: called with each phase of start-up and how far it is (0 to 1).
            on_restart: called when a core has been replaced.
        """
        return cls(engine_args, on_progress=on_progress, on_restart=on_restart)

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        *,
        key_file: str | None = None,
        insecure_tcp: bool = False,
        client_key: str | None = None,
        tokenizer: str | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
        on_restart: RestartCallback | None = None,
    ) -> Self:
        """An engine that was launched elsewhere (`footplate-engine`), at the default address or
        another. Shutting this object down leaves that engine running. When its core dies, streams
        go on in the one that takes its place.

        Args:
            key_file: for a tcp address: the keys that the engine's owner has made for this client.
            insecure_tcp: for a loopback tcp address: do without; the engine may be anybody's.
            client_key: a secret of 16 to 256 characters that the application keeps, to be known by
                when it comes back (see `attach`): whoever knows it can take over the requests, so
                make it with `secrets.token_hex()`. One engine object has it at a time; when another
                connects with it, this one ends with EngineDeadError.
            tokenizer: folder of the tokenizer, if the engine's own cannot be read from here.
            timeout_s: for the engine to answer, now and when its core is replaced.
            on_restart: called when streams go on in another core.

        Raises:
            InvalidParameterError: address and keys do not go together, or `client_key` is too
                short or too long.
            KeyFileError: the file cannot be used.
        """
        return cls(
            address=address or default_address(),
            key_file=key_file,
            insecure_tcp=insecure_tcp,
            client_key=client_key,
            tokenizer=tokenizer,
            start_timeout_s=timeout_s,
            on_restart=on_restart,
        )

    # ---- life

    async def start(self) -> None:
        """Start or attach, and return when the engine is ready. Starting twice is no error.

        Raises:
            EngineStartError: with the root cause.
            EngineDeadError: this engine has died; build another.
        """
        await self._session.start()

    def shutdown(self, detach: bool = False) -> None:
        """End all streams with `EngineClosedError`, and the core, if it is this engine's own.
        May be called in any state, more than once, and without a running loop.

        Args:
            detach: let detachable requests go on in the core, to be attached to later; all others
                are aborted.

        Raises:
            InvalidRequestError: `detach` without a client key. Nothing was done.
        """
        if detach and not self._has_client_key:
            raise InvalidRequestError(
                "detach=True needs an engine that was connected with a client_key: nothing could "
                "be attached to again"
            )
        self._session.stop(may_return=detach)
        self._preparation.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    async def drain(self, timeout_s: float | None = None) -> None:
        """Take no new requests, and return when the core has none left.

        The core refuses those of its other clients as well. Then `shutdown` loses nothing.

        Args:
            timeout_s: requests that are left then end with finish reason `abort`. None waits for
                ever.
        """
        if timeout_s is not None:
            require_number("timeout_s", timeout_s, 0.0, math.inf)
        await self._session.drain(timeout_s)

    async def replace_core(self, engine_args: EngineArgs) -> None:
        """Go on with another core: new weights of the same architecture, other limits. It is
        started beside the one there is, which serves until the other is ready; then every stream
        goes on in that one, behind the tokens it has. `CompletionOutput.weights_versions` says from
        which position on which weights made them.

        Args:
            engine_args: of the new core, and of those that take its place later.

        Raises:
            EngineStartError: the new core could not start. The old one goes on.
            EngineError: it has another architecture or vocabulary, or this engine is somebody
                else's; likewise.
        """
        await self._session.replace_core(engine_args)

    def start_background_loop(self) -> None:
        """Begin to start without waiting; needs a running loop. The name is vLLM's."""
        if self.errored:
            raise self.dead_error
        self._session.begin_to_start()

    def shutdown_background_loop(self) -> None:
        """As `shutdown`. The name is vLLM's."""
        self.shutdown()

    # ---- state

    @property
    def is_running(self) -> bool:
        """Whether requests can be served now; not while the core is being replaced."""
        return self._session.state is EngineState.SERVING

    @property
    def is_stopped(self) -> bool:
        """Whether the engine has ended, by itself or by its owner."""
        return self._session.state in (EngineState.STOPPED, EngineState.DEAD)

    @property
    def errored(self) -> bool:
        """Whether the engine has ended without being asked to, and no other core has come."""
        return self._session.dead_error is not None

    @property
    def dead_error(self) -> EngineError:
        """What requests are answered with after the engine's death, or would be."""
        return self._session.dead_error or EngineDeadError("the engine core is not running")

    async def health(self) -> Health:
        """How the engine is: the core's process is asked, and its answer waited for (a second at
        most). It answers during a step as well."""
        return await self._session.health()

    async def check_health(self) -> None:
        """Return if the engine serves requests and gets on with them.

        Raises:
            EngineNotReadyError: its core is being replaced, does not answer, or is stuck in a step.
            EngineError: it has died, was shut down, or has not been started.
        """
        self._session.require_serving()
        health = await self._session.health()
        self._session.require_serving()
        if not health.is_alive:
            raise EngineNotReadyError("the engine core does not answer")
        if not health.is_ready and health.state == "serving":
            raise EngineNotReadyError(
                f"the engine core has been in one step for {health.last_step_age_s:.1f} s"
            )

    @property
    def engine_restarts(self) -> int:
        """How often a core has been replaced: another process serves since. A core that is only
        connected to again does not count, nor does `replace_core`."""
        return self._session.num_restarts

    @property
    def requests_replayed(self) -> int:
        """How many requests were sent again, to another core or over another connection, so that
        they went on: each as often as that."""
        return self._session.num_replayed

    @property
    def process_id(self) -> int | None:
        """The engine core's pid; None until it was ready for the first time."""
        return self._session.process_id

    @property
    def start_phases(self) -> dict[str, float]:
        """Seconds that each phase of the core's start-up took."""
        return self._session.welcome.phases

    # ---- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
        ttft_deadline_s: float | None = None,
        deadline_s: float | None = None,
        detachable: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the output of one request as it grows.

        Leaving the loop early, cancelling the task or dropping the generator aborts the request.

        Args:
            prompt: text, token ids, chat messages, or a mapping (see `Prompt`).
            request_id: unique among this object's live requests; made up if not given.
            priority: lower runs earlier, under the priority policy.
            arrival_time: when the request came, as `time.time()` has it, if that was before this
                call. Who came first is served first; deadlines count from it.
            ttft_deadline_s: most seconds from arrival to the first token; then the request ends
                with finish reason `deadline`.
            deadline_s: most seconds from arrival to the last token, likewise.
            detachable: when this process dies, or its connection, the request goes on, for
                `EngineArgs.lease_s` seconds and within `lease_bytes`, and can be taken up with
                `attach`. It needs a client key and a `request_id`, and has n=1 and no logprobs.
                Closing its stream ends it as any other.

        Raises:
            InvalidRequestError: the request was refused; nothing has been sent.
            QueueOverflowError: too many requests wait already.
            RequestFailedError: the core could not finish this request.
            EngineDrainingError: the engine takes no new requests.
            EngineError: the engine could not start, has died or was shut down.
        """
        stream = await self.add_request(
            request_id,
            prompt,
            sampling_params,
            priority=priority,
            arrival_time=arrival_time,
            ttft_deadline_s=ttft_deadline_s,
            deadline_s=deadline_s,
            detachable=detachable,
        )
        try:
            async for output in stream:
                yield output
        finally:
            # Without this a request that nobody reads would hold its KV blocks until max_tokens.
            stream.close()

    async def add_request(
        self,
        request_id: str | None,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
        ttft_deadline_s: float | None = None,
        deadline_s: float | None = None,
        detachable: bool = False,
    ) -> RequestStream:
        """Start one request and return its stream, which the caller iterates to its end or closes:
        a stream that is only dropped runs on. For arguments and errors see `generate`."""
        await self._session.ensure_started()
        self._session.require_open()
        params = SamplingParams() if params is None else params
        schedule = RequestSchedule(priority, arrival_time, ttft_deadline_s, deadline_s)
        self._check_arguments(request_id, params, schedule)
        require_bool("detachable", detachable)
        if detachable:
            require_detachable(request_id, params, has_client_key=self._has_client_key)
        requests = self._session.welcome.requests
        self._client.waiting.require_room(requests, params.n)
        stream = RequestStream(
            f"{self._random.getrandbits(128):032x}" if request_id is None else request_id,
            self._client.new_handles(params.n),
            params,
            self._random.getrandbits(63) if params.seed is None else params.seed,
            schedule.metrics(),
            self._abandon,
            requests.stream_interval,
            requests.max_unread_tokens,
            self._client.notices,
        )
        # Opened before the prompt is encoded: from here on the id is taken, and can be aborted.
        self._client.open(stream)
        try:
            message = await self._preparation.prepare(
                stream, parse_prompt(prompt), schedule, is_detachable=detachable
            )
            if not stream.is_finished:
                # Asked again: others have come while the prompt was encoded.
                num_tokens = len(stream.prompt_token_ids)
                self._client.waiting.require_room(requests, params.n, num_tokens)
                self._session.send(message)
                self._client.enqueue(stream, message)
        except BaseException:
            self._client.discard(stream)
            raise
        try:
            await self._session.has_room()
        except BaseException:
            stream.close()
            raise
        return stream

    async def attach(
        self,
        request_id: str,
        sampling_params: SamplingParams | None = None,
        *,
        from_position: int = 0,
    ) -> RequestStream:
        """Go on with a detachable request that an engine object with the same client key has sent,
        in this process or another that is gone. It is a request like any other from here on.

        It runs, or ended within the lease time. `RequestOutput.prompt` is None: token ids are what
        is kept.

        Args:
            sampling_params: text and outputs are made as these say: `stop`, `output_kind`,
                `detokenize` and what else the client sees to. Give those that the request was sent
                with. What concerns tokens is as it was, whatever stands here.
            from_position: how many output tokens the application has. With `DELTA` the first output
                begins behind them, with their text and a character or stop string that was cut
                there; `CUMULATIVE` and `FINAL_ONLY` show all. If there are fewer yet, the stream
                waits until there are more.

        Raises:
            RequestLostError: nothing of this id is kept.
            DuplicateRequestError: it is live in this object.
            InvalidRequestError: there is no client key, or an argument makes no sense.
            EngineError: the engine could not start, has died or was shut down.
        """
        await self._session.ensure_started()
        params = SamplingParams() if sampling_params is None else sampling_params
        require_sampling_params(params)
        require_detachable(request_id, params, has_client_key=self._has_client_key)
        require_int("from_position", from_position, 0, MAX_INT)
        make_text = await self._preparation.text_maker(params)
        requests = self._session.welcome.requests
        stream = AttachingStream(
            request_id,
            self._client.new_handles(1),
            params,
            make_text,
            from_position,
            RequestSchedule().metrics(),
            self._abandon,
            requests.stream_interval,
            requests.max_unread_tokens,
            self._client.notices,
        )
        self._client.open(stream)
        try:
            self._session.send(self._client.ask_for(stream))
            await stream.until_attached()
        except BaseException:
            # It is not aborted: who gives up waiting may ask again.
            self._client.discard(stream)
            raise
        return stream

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield one output: the best continuations, best first, one completion for each.

        It comes when the search is over. Leaving before, or cancelling the task, aborts what is
        under way. For other arguments and errors see `generate`.

        Args:
            request_id: names the output; the requests of the beams have ids that begin with it.
        """
        await self._session.ensure_started()
        self._session.require_open()
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"beam search params must be BeamSearchParams, got {type(params).__name__}"
            )
        schedule = RequestSchedule(priority)
        self._check_request(request_id, schedule)
        request_id = request_id or f"{self._random.getrandbits(128):032x}"
        metrics = schedule.metrics()
        parsed = parse_prompt(prompt)
        text, token_ids = await self._preparation.encode(parsed)
        model = self._session.welcome.model
        resolve_max_tokens(token_ids, SamplingParams(max_tokens=params.max_tokens), model)
        # All beams of a step wait at once.
        width, requests = params.beam_width, self._session.welcome.requests
        self._client.waiting.require_room(requests, width, width * len(token_ids))
        tokenizer = await self._preparation.tokenizer() if params.detokenize else None
        grammar = None
        if params.structured_outputs is not None:
            grammar = await self._preparation.translate(params.structured_outputs)
        call = BeamCall(
            request_id,
            token_ids,
            parsed.cache_salt,
            schedule,
            self._session,
            self._client,
            self._abandon,
        )
        search = BeamSearch.of(params, model.eos_token_ids)
        outputs = await run_beam_search(search, RequestScorer(call, params, model, grammar))
        completions = as_completions(outputs, token_ids, params, tokenizer)
        yield RequestOutput(request_id, text, token_ids, completions, True, 0, metrics)

    def _check_arguments(
        self, request_id: object, params: object, schedule: RequestSchedule
    ) -> None:
        self._check_request(request_id, schedule)
        require_sampling_params(params)

    def _check_request(self, request_id: object, schedule: RequestSchedule) -> None:
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InvalidRequestError(f"request_id must be a non-empty string, got {request_id!r}")
        schedule.check(self._session.welcome.limits)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests with finish reason `abort` and what there is so far. Unknown and finished
        ids are no error.

        Raises:
            InvalidParameterError: what was given is no id.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(ids, Iterable):
            raise InvalidParameterError("request_id", request_id, "an id, or several")
        ids = list(ids)
        for each in ids:
            if not isinstance(each, str):
                raise InvalidParameterError("request_id", each, "a string")
        self._abort(ids)

    def _abort(self, request_ids: Iterable[str]) -> None:
        message = self._client.abort(request_ids)
        if message is not None:
            self._client.notices.abort(message.handles)

    def _abandon(self, stream: RequestStream) -> None:
        self._abort([stream.request_id])

    # ---- facts and control

    async def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the engine's model. Raises TokenizerError if there is none."""
        await self._session.ensure_started()
        return await self._preparation.tokenizer()

    async def get_model_config(self) -> ModelFacts:
        """What the core found out about its model."""
        await self._session.ensure_started()
        return self._session.welcome.model

    async def get_scheduler_config(self) -> Limits:
        """The core's limits."""
        await self._session.ensure_started()
        return self._session.welcome.limits

    async def get_stats(self) -> Stats:
        """The core's books, as they stand between two steps."""
        reply = await self._session.call(GetStats)
        assert reply.stats is not None
        return reply.stats

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while requests are running."""
        return (await self._session.call(ResetPrefixCache)).ok
