"""The client object: an LLM engine as an asyncio application sees it."""

import asyncio
import logging
import os
import random
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from footplate.frontend.connection import Connection
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_state import EngineEvent, EngineState, advance
from footplate.frontend.outputs import RequestMetrics, RequestOutput
from footplate.frontend.prompts import (
    ParsedPrompt,
    Prompt,
    parse_prompt,
    resolve_max_tokens,
    tokenize,
)
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings, Tokenizer, load_tokenizer
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
)
from footplate.protocol.links import default_address, make_private_dir
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ControlReply,
    CoreMessage,
    EngineFailed,
    GetStats,
    Limits,
    ModelFacts,
    Progress,
    ResetPrefixCache,
    Stats,
    StepOutputs,
    Welcome,
)
from footplate.protocol.params import SamplingParams, TokenParams

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
OWN_CORE_EXIT_S = 1.0
# Handing a text to a thread costs about as much as encoding this many characters.
MAX_CHARS_ENCODED_INLINE = 256

T = TypeVar("T")
ProgressCallback = Callable[[str, float], None]


class AsyncLLMEngine:
    """Holds one stream per request, over an engine core in another process.

    Owns the connection and, unless it was attached to a running engine, the core process. Use
    from one event loop at a time. Starts by itself at the first request; constructing needs no
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
        tokenizer: str | None = None,
        start_timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """See `from_engine_args` and `connect`, which say what goes together."""
        self._args = engine_args or EngineArgs()
        self._address = address
        self._tokenizer_source = tokenizer or self._args.tokenizer
        self._start_timeout_s = (
            self._args.start_timeout_s if start_timeout_s is None else start_timeout_s
        )
        self._on_progress = on_progress
        self._state = EngineState.NEW
        self._dead_error: EngineError | None = None
        self._starting: asyncio.Task[None] | None = None
        self._process: CoreProcess | None = None
        self._connection: Connection | None = None
        self._owner: int | None = None
        self._losing: asyncio.TimerHandle | None = None
        self._finalizer: weakref.finalize[..., AsyncLLMEngine] | None = None
        self._welcome: Welcome | None = None
        self._client = EngineClient()
        self._calls: dict[int, asyncio.Future[ControlReply]] = {}
        self._num_calls = 0
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_loading: asyncio.Task[Tokenizer] | None = None
        self._text_thread: ThreadPoolExecutor | None = None
        self._random = random.Random()

    @classmethod
    def from_engine_args(
        cls, engine_args: EngineArgs | None = None, *, on_progress: ProgressCallback | None = None
    ) -> Self:
        """An engine with a core process of its own.

        Args:
            on_progress: called with each phase of start-up and how far it is (0 to 1).
        """
        return cls(engine_args, on_progress=on_progress)

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        *,
        tokenizer: str | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Self:
        """An engine that was launched elsewhere (`footplate-engine`), at the default address or
        another. Shutting this object down leaves that engine running.

        Args:
            tokenizer: folder of the tokenizer, if the engine's own cannot be read from here.
        """
        return cls(
            address=address or default_address(), tokenizer=tokenizer, start_timeout_s=timeout_s
        )

    # ---- life

    async def start(self) -> None:
        """Start or attach, and return when the engine is ready. Starting twice is no error.

        Raises:
            EngineStartError: with the root cause.
            EngineDeadError: this engine has died; build another.
        """
        if self._state is EngineState.SERVING:
            return
        if self._dead_error is not None:
            raise self._dead_error
        # Several requests may wait for one start; cancelling one of them must not cancel it.
        await asyncio.shield(self._starting or self._begin_to_start())

    async def _ensure_started(self) -> None:
        if self._state is EngineState.STOPPED:
            # A straggler must not bring back what its owner has shut down.
            raise EngineClosedError("the engine was shut down")
        if self._owner not in (None, os.getpid()):
            raise EngineClosedError(
                f"the engine belongs to process {self._owner}, this is a fork of it: sockets do "
                "not survive a fork; build another engine here"
            )
        await self.start()

    def _begin_to_start(self) -> "asyncio.Task[None]":
        # The state changes now, not when the task has its first turn: until then it may be shut
        # down, and started again.
        self._advance(EngineEvent.START)
        self._owner = os.getpid()
        self._starting = asyncio.create_task(self._start(), name="footplate start")
        self._starting.add_done_callback(_retrieve_error)
        return self._starting

    def _require_wanted(self) -> None:
        if self._starting is not asyncio.current_task():
            raise EngineClosedError("the engine was shut down while it was starting") from None

    async def _start(self) -> None:
        self._require_wanted()
        try:
            address = self._address or self._start_process()
            # Callbacks must not keep a dropped engine alive: the event loop holds them.
            self._connection = Connection(
                address,
                on_messages=_weakly(self._on_messages),
                on_lost=_weakly(self._on_connection_lost),
                on_progress=_weakly(self._report_progress),
            )
            self._welcome = await self._connection.open(self._start_timeout_s)
            self._require_wanted()
        except BaseException as error:
            self._require_wanted()
            self._release()
            self._advance(EngineEvent.DIE)
            self._dead_error = (
                error
                if isinstance(error, EngineError)
                else EngineStartError(f"start-up was interrupted: {error!r}")
            )
            raise
        self._advance(EngineEvent.READY)
        self._starting = None
        self._finalizer = weakref.finalize(
            self, _release_later, asyncio.get_running_loop(), self._connection, self._process
        )

    def _start_process(self) -> str:
        folder = make_private_dir()
        address = f"ipc://{folder / 'engine.sock'}"
        loop, tell = asyncio.get_running_loop(), _weakly(self._on_core_exit)

        def on_exit(error: EngineStartError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(tell, error)

        self._process = CoreProcess(self._args.core_config(address, str(folder)), on_exit)
        return address

    def shutdown(self) -> None:
        """End all streams with `EngineClosedError`, and the core, if it is this engine's own.
        May be called in any state, more than once, and without a running loop."""
        self._advance(EngineEvent.STOP)
        self._client.fail_all(EngineClosedError("the engine was shut down"))
        self._release()
        self._starting = None
        self._dead_error = None
        # The next start may find another model, on another event loop.
        self._tokenizer = None
        self._tokenizer_loading = None

    def _release(self) -> None:
        for call in self._calls.values():
            if not call.done():
                call.cancel()
        self._calls.clear()
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._losing is not None:
            self._losing.cancel()  # it means this core, not one that is started later
            self._losing = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._text_thread is not None:
            self._text_thread.shutdown(wait=False)
            self._text_thread = None

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

    def start_background_loop(self) -> None:
        """Begin to start without waiting; needs a running loop. The name is vLLM's."""
        if self.errored:
            raise self.dead_error
        if self.is_running or self._starting is not None:
            raise RuntimeError("the engine is running already")
        self._begin_to_start()

    def shutdown_background_loop(self) -> None:
        """As `shutdown`. The name is vLLM's."""
        self.shutdown()

    # ---- state

    @property
    def is_running(self) -> bool:
        """Whether requests can be served now."""
        return self._state is EngineState.SERVING

    @property
    def is_stopped(self) -> bool:
        """Whether the engine has ended, by itself or by its owner."""
        return self._state in (EngineState.STOPPED, EngineState.DEAD)

    @property
    def errored(self) -> bool:
        """Whether the engine has ended without being asked to."""
        return self._dead_error is not None

    @property
    def dead_error(self) -> EngineError:
        """What requests are answered with after the engine's death, or would be."""
        return self._dead_error or EngineDeadError("the engine core is not running")

    async def check_health(self) -> None:
        """Return if the engine serves requests.

        Raises:
            EngineError: it has died, was shut down, or has not been started.
        """
        if self._dead_error is not None:
            raise self._dead_error
        if self._state is not EngineState.SERVING:
            raise EngineClosedError(f"the engine is {self._state.name.lower()}")

    @property
    def process_id(self) -> int | None:
        """The engine core's pid; None until it is ready."""
        return self._welcome.process_id if self._welcome else None

    @property
    def start_phases(self) -> dict[str, float]:
        """Seconds that each phase of the core's start-up took."""
        return self._ready().phases

    def _advance(self, event: EngineEvent) -> None:
        self._state = advance(self._state, event)

    def _ready(self) -> Welcome:
        if self._welcome is None:
            raise EngineClosedError("the engine has not been started")
        return self._welcome

    # ---- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the output of one request as it grows.

        Leaving the loop early, cancelling the task or dropping the generator aborts the request.

        Args:
            prompt: text, token ids, chat messages, or a mapping (see `Prompt`).
            request_id: unique among this object's live requests; made up if not given.
            priority: lower runs earlier, under the priority policy.

        Raises:
            InvalidRequestError: the request was refused; nothing has been sent.
            RequestFailedError: the core could not finish this request.
            EngineError: the engine could not start, has died or was shut down.
        """
        stream = await self.add_request(request_id, prompt, sampling_params, priority=priority)
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
    ) -> RequestStream:
        """Start one request and return its stream, which the caller iterates or closes. For
        arguments and errors see `generate`."""
        await self._ensure_started()
        request_id = request_id or uuid.uuid4().hex
        params = params or SamplingParams()
        self._client.require_unused(request_id)
        self._check_priority(priority)
        metrics = RequestMetrics(time.time(), time.monotonic())
        parsed = parse_prompt(prompt)
        text, token_ids = await self._token_ids_of(parsed)
        max_tokens = resolve_max_tokens(token_ids, params, self._ready().model)
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        detokenizer = None
        if params.detokenize:
            detokenizer = (await self.get_tokenizer()).detokenizer(
                token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        stops = params.stop_strings
        stream = RequestStream(
            request_id,
            self._client.new_handle(),
            text,
            token_ids,
            params,
            seed,
            metrics,
            detokenizer,
            StopStrings(stops, params.include_stop_str_in_output) if stops else None,
            self._abandon,
        )
        token_params = TokenParams.resolve(
            params,
            seed=seed,
            max_tokens=max_tokens,
            eos_token_ids=self._ready().model.eos_token_ids,
        )
        await self._submit(
            stream,
            AddRequest(stream.handle, token_ids, token_params, priority, parsed.cache_salt),
        )
        return stream

    async def _submit(self, stream: RequestStream, message: AddRequest) -> None:
        # The engine may have ended while the prompt was encoded.
        await self.check_health()
        assert self._connection is not None
        self._client.require_unused(stream.request_id)
        self._connection.send(message)  # first: what is too large leaves no trace
        self._client.open(stream)
        try:
            await self._connection.has_room()
        except BaseException:
            stream.close()
            raise

    def _check_priority(self, priority: int) -> None:
        if priority and self._ready().limits.policy != "priority":
            raise InvalidRequestError(
                f"priority={priority} needs an engine with scheduling_policy='priority'"
            )
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequestError(f"priority={priority} must fit into 32 bits")

    async def _token_ids_of(self, parsed: ParsedPrompt) -> tuple[str | None, list[int]]:
        if parsed.token_ids is not None:
            return None, parsed.token_ids
        tokenizer = await self.get_tokenizer()
        if parsed.text is not None and len(parsed.text) <= MAX_CHARS_ENCODED_INLINE:
            return tokenize(parsed, tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor(), tokenize, parsed, tokenizer)

    def _executor(self) -> ThreadPoolExecutor:
        if self._text_thread is None:
            self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="footplate-text")
        return self._text_thread

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests with finish reason `abort` and what there is so far. Unknown and finished
        ids are no error."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._abort(ids)

    def _abort(self, request_ids: Iterable[str]) -> None:
        message = self._client.abort(request_ids)
        if message is not None and self._connection is not None:
            self._connection.send(message)

    def _abandon(self, stream: RequestStream) -> None:
        self._abort([stream.request_id])

    # ---- facts and control

    async def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the engine's model. Raises TokenizerError if there is none."""
        if self._tokenizer is None:
            await self._ensure_started()
            if self._tokenizer_loading is None:
                source = self._tokenizer_source or self._ready().model.tokenizer
                self._tokenizer_loading = asyncio.ensure_future(self._load_tokenizer(source))
            self._tokenizer = await asyncio.shield(self._tokenizer_loading)
        return self._tokenizer

    async def _load_tokenizer(self, source: str) -> Tokenizer:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor(), load_tokenizer, source)

    async def get_model_config(self) -> ModelFacts:
        """What the core found out about its model."""
        await self._ensure_started()
        return self._ready().model

    async def get_scheduler_config(self) -> Limits:
        """The core's limits."""
        await self._ensure_started()
        return self._ready().limits

    async def get_stats(self) -> Stats:
        """The core's books, as they stand between two steps."""
        reply = await self._call(GetStats)
        assert reply.stats is not None
        return reply.stats

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while requests are running."""
        return (await self._call(ResetPrefixCache)).ok

    async def _call(self, message: type[GetStats] | type[ResetPrefixCache]) -> ControlReply:
        await self._ensure_started()
        assert self._connection is not None
        self._num_calls += 1
        reply: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._calls[self._num_calls] = reply
        self._connection.send(message(self._num_calls))
        try:
            return await reply
        except asyncio.CancelledError:
            await self.check_health()  # cancelled because the engine ended: say so
            raise

    # ---- what the core says

    def _on_messages(self, messages: list[CoreMessage]) -> None:
        assert self._welcome is not None
        now = time.monotonic()
        over: list[int] = []
        for message in messages:
            match message:
                case StepOutputs():
                    if message.epoch != self._welcome.epoch:
                        continue
                    try:
                        over += self._client.handle(message, now)
                    except ValueError as error:
                        self._die(f"the engine core sent outputs that make no sense: {error}")
                        return
                case ControlReply(call=call):
                    reply = self._calls.pop(call, None)
                    if reply is not None and not reply.done():
                        reply.set_result(message)
                case EngineFailed(cause=cause):
                    self._die(cause)
                    return
                case _:
                    logger.warning("unexpected %s on the output socket", type(message).__name__)
        if over and self._connection is not None:
            self._connection.send(AbortRequests(over))

    def _report_progress(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress.phase, progress.fraction)

    def _on_connection_lost(self, cause: str) -> None:
        # The end of a core of our own is explained better, and about as fast, by its process.
        patience_s = 0.0 if self._process is None else OWN_CORE_EXIT_S
        loop, die = asyncio.get_running_loop(), _weakly(self._die)
        self._losing = self._losing or loop.call_later(patience_s, die, cause)

    def _on_core_exit(self, error: EngineStartError) -> None:
        if self._state is EngineState.STARTING and self._connection is not None:
            self._connection.refuse(error)
        else:
            self._die(str(error))

    def _die(self, cause: str) -> None:
        if self._state is EngineState.STARTING and self._connection is not None:
            self._connection.refuse(EngineStartError(cause))
        if self._state is not EngineState.SERVING:
            return
        self._advance(EngineEvent.DIE)
        self._dead_error = EngineDeadError(cause)
        logger.error("the engine core is gone: %s", cause)
        self._client.fail_all(self._dead_error)
        self._release()


def _retrieve_error(task: "asyncio.Task[None]") -> None:
    """Whoever waits for a start is told how it ended; that nobody waits is nothing to log."""
    if not task.cancelled():
        task.exception()


def _weakly(method: Callable[[T], None]) -> Callable[[T], None]:
    """A callback that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def call(argument: T) -> None:
        if (target := reference()) is not None:
            target(argument)

    return call


def _release_later(
    loop: asyncio.AbstractEventLoop, connection: Connection, process: CoreProcess | None
) -> None:
    """Clean up behind an engine that was dropped without shutdown, maybe by another thread."""
    if process is not None:
        process.stop()
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(connection.close)
