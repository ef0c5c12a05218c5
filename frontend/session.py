"""One engine from its start to its end, as its client lives through it.

Starts a core or attaches to one, notices when it is gone, and carries messages both ways in
between. What the messages mean to a request is `EngineClient`'s business.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from footplate.frontend.connection import Connection
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_state import EngineEvent, EngineState, advance
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
)
from footplate.protocol.keys import ClientKeys
from footplate.protocol.links import make_private_dir
from footplate.protocol.messages import (
    AbortRequests,
    ControlReply,
    CoreMessage,
    EngineFailed,
    GetStats,
    Message,
    Progress,
    ResetPrefixCache,
    StepOutputs,
    Welcome,
)

logger = logging.getLogger(__name__)

OWN_CORE_EXIT_S = 1.0

_WHY_CLOSED = {
    EngineState.NEW: "the engine has not been started: await start()",
    EngineState.STARTING: "the engine is still starting: await start()",
    EngineState.STOPPED: "the engine was shut down",
}

T = TypeVar("T")
ProgressCallback = Callable[[str, float], None]


class Session:
    """Owns the state of an engine, the connection to it, the core process if it is our own, and
    the control calls that wait for an answer. Use from one event loop at a time.

    Attributes:
        state: where the engine is in its life.
        dead_error: why it died, if it did.
    """

    def __init__(
        self,
        args: EngineArgs,
        address: str | None,
        client: EngineClient,
        start_timeout_s: float,
        on_progress: ProgressCallback | None,
        keys: ClientKeys | None = None,
    ) -> None:
        """Args:
        address: of an engine to attach to; None starts a core with `args`.
        keys: for the link to it, if that is encrypted.
        client: is given all outputs, and told when the engine ends.
        """
        self.state = EngineState.NEW
        self.dead_error: EngineError | None = None
        self._args = args
        self._address = address
        self._client = client
        self._start_timeout_s = start_timeout_s
        self._on_progress = on_progress
        self._keys = keys
        self._starting: asyncio.Task[None] | None = None
        self._process: CoreProcess | None = None
        self._connection: Connection | None = None
        self._owner: int | None = None
        self._losing: asyncio.TimerHandle | None = None
        self._finalizer: weakref.finalize[..., Session] | None = None
        self._welcome: Welcome | None = None
        self._calls: dict[int, asyncio.Future[ControlReply]] = {}
        self._num_calls = 0

    @property
    def welcome(self) -> Welcome:
        """What the core said of itself when it was ready.

        Raises:
            EngineClosedError: it never was.
        """
        if self._welcome is None:
            raise EngineClosedError("the engine has not been started")
        return self._welcome

    @property
    def process_id(self) -> int | None:
        """The core's pid; None until it was ready for the first time."""
        return None if self._welcome is None else self._welcome.process_id

    # ---- life

    async def start(self) -> None:
        """See `AsyncLLMEngine.start`."""
        if self.state is EngineState.SERVING:
            return
        if self.dead_error is not None:
            raise self.dead_error
        # Several requests may wait for one start; cancelling one of them must not cancel it.
        await asyncio.shield(self._starting or self.begin_to_start())

    async def ensure_started(self) -> None:
        """As `start`, for those who only want to use the engine.

        Raises:
            EngineClosedError: it was shut down, or belongs to another process.
        """
        if self.state is EngineState.STOPPED:
            # A straggler must not bring back what its owner has shut down.
            raise EngineClosedError("the engine was shut down")
        if self._owner not in (None, os.getpid()):
            raise EngineClosedError(
                f"the engine belongs to process {self._owner}, this is a fork of it: sockets do "
                "not survive a fork; build another engine here"
            )
        await self.start()

    def begin_to_start(self) -> "asyncio.Task[None]":
        """Start without waiting; needs a running loop."""
        if self._starting is not None or self.state is EngineState.SERVING:
            raise RuntimeError("the engine is running already")
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
                keys=self._keys,
            )
            self._welcome = await self._connection.open(self._start_timeout_s)
            self._require_wanted()
        except BaseException as error:
            self._require_wanted()
            self._release()
            self._starting = None
            if self._address is not None:
                # Somebody else's engine: it may be up the next time.
                self._advance(EngineEvent.GIVE_UP)
                raise
            self._advance(EngineEvent.DIE)
            self.dead_error = (
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

    def stop(self) -> None:
        """End it, from any state; streams end with `EngineClosedError`."""
        self._advance(EngineEvent.STOP)
        self._client.fail_all(EngineClosedError("the engine was shut down"))
        self._release()
        self._starting = None
        self.dead_error = None

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

    def _advance(self, event: EngineEvent) -> None:
        self.state = advance(self.state, event)

    def require_serving(self) -> None:
        """Raise the `EngineError` that says why requests cannot be served now, if so."""
        if self.dead_error is not None:
            raise self.dead_error
        if self.state is not EngineState.SERVING:
            raise EngineClosedError(_WHY_CLOSED[self.state])

    # ---- what goes to the core

    def send(self, message: Message, *, gather: bool = False) -> None:
        """Queue one message; never blocks.

        Args:
            gather: see `Connection.send`.

        Raises:
            EngineError: the engine is not serving.
            MessageTooLargeError: nothing was queued.
        """
        self.require_serving()
        assert self._connection is not None
        self._connection.send(message, gather=gather)

    async def has_room(self) -> None:
        """Wait until the core has taken what `send` could not get rid of."""
        if self._connection is not None:
            await self._connection.has_room()

    async def call(self, message: type[GetStats] | type[ResetPrefixCache]) -> ControlReply:
        """Make a control call and wait for its answer."""
        await self.ensure_started()
        self._num_calls += 1
        reply: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._calls[self._num_calls] = reply
        self.send(message(self._num_calls))
        try:
            return await reply
        except asyncio.CancelledError:
            self.require_serving()  # cancelled because the engine ended: say so
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
        if self.state is EngineState.STARTING and self._connection is not None:
            self._connection.refuse(error)
        else:
            self._die(str(error))

    def _die(self, cause: str) -> None:
        if self.state is EngineState.STARTING and self._connection is not None:
            self._connection.refuse(EngineStartError(cause))
        if self.state is not EngineState.SERVING:
            return
        self._advance(EngineEvent.DIE)
        self.dead_error = EngineDeadError(cause)
        logger.error("the engine core is gone: %s", cause)
        self._client.fail_all(self.dead_error)
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
