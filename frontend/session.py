"""One engine from its start to its end, as its client lives through it.

Starts a core or attaches to one, and carries messages both ways. How it goes on when that core is
gone is `Succession`'s business, and what the messages mean to a request is `EngineClient`'s.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable

from footplate.frontend.control_calls import ControlCall, ControlCalls
from footplate.frontend.core_link import CoreLink
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_life import EngineLife
from footplate.frontend.engine_state import EngineEvent, EngineState
from footplate.frontend.health import Health
from footplate.frontend.loss import Loss, LossKind
from footplate.frontend.succession import RestartCallback, Succession
from footplate.frontend.supervisor import Supervisor
from footplate.frontend.watchdog import Patience
from footplate.frontend.weak_callbacks import weakly
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineStartError,
)
from footplate.protocol.keys import ClientKeys
from footplate.protocol.messages import (
    AbortRequests,
    Attached,
    ControlReply,
    CoreMessage,
    Drain,
    EngineFailed,
    EngineStopping,
    Message,
    Pong,
    Progress,
    Refused,
    StepOutputs,
    Welcome,
)

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float], None]


class Session:
    """Owns the start of an engine, and whether it drains. Use from one event loop at a time."""

    def __init__(
        self,
        client: EngineClient,
        supervisor: Supervisor | None,
        address: str | None,
        start_timeout_s: float,
        *,
        keys: ClientKeys | None = None,
        patience: Patience = Patience(),  # noqa: B008 (frozen)
        is_always_watching: bool = False,
        name: bytes | None = None,
        on_progress: ProgressCallback | None = None,
        on_restart: RestartCallback | None = None,
    ) -> None:
        """Args:
        client: is given all outputs, asked what to replay, and told when the engine ends.
        supervisor: of a core of our own; with None somebody else's is at `address`.
        start_timeout_s: for a core to be ready, the first one and each that takes its place.
        keys: for the link to it, if that is encrypted.
        is_always_watching: also while nobody waits for the core.
        name: of this client, to be known by in its next process; None makes one up.
        on_restart: told when streams go on in another core.
        """
        self._client = client
        self._is_always_watching = is_always_watching
        self._on_progress = on_progress
        self._life = EngineLife()
        self._calls = ControlCalls()
        is_waited_for = weakref.WeakMethod(self._is_waited_for)
        self._link = CoreLink(
            supervisor,
            address,
            start_timeout_s,
            patience=patience,
            keys=keys,
            name=name,
            is_waited_for=lambda: (ask := is_waited_for()) is not None and ask(),
            on_messages=weakly(self._on_messages),
            on_lost=weakly(self._on_lost),
            on_progress=weakly(self._report_progress),
        )
        self._succession = Succession(self._life, self._link, client, self._calls, on_restart)
        self._starting: asyncio.Task[None] | None = None
        self._owner: int | None = None
        self._is_draining = False
        send_soon = weakref.WeakMethod(self._send_notices_soon)
        client.notices.on_first = lambda: (send := send_soon()) is not None and send()

    # ---- state

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._life.state

    @property
    def dead_error(self) -> EngineError | None:
        """Why it died, if it did."""
        return self._life.dead_error

    @property
    def welcome(self) -> Welcome:
        """What the core said of itself when it was ready.

        Raises:
            EngineClosedError: it never was.
        """
        if self._succession.welcome is None:
            raise EngineClosedError("the engine has not been started")
        return self._succession.welcome

    @property
    def process_id(self) -> int | None:
        """The core's pid; None until it was ready for the first time."""
        welcome = self._succession.welcome
        return None if welcome is None else welcome.process_id

    @property
    def num_restarts(self) -> int:
        """See `AsyncLLMEngine.engine_restarts`."""
        return self._succession.num_restarts

    @property
    def num_replayed(self) -> int:
        """See `AsyncLLMEngine.requests_replayed`."""
        return self._succession.num_replayed

    def require_serving(self) -> None:
        """Raise the `EngineError` that says why requests cannot be served now, if so."""
        self._life.require_serving()

    def require_open(self) -> None:
        """Raise EngineDrainingError if no new requests are taken."""
        if self._is_draining:
            raise EngineDrainingError(
                "the engine is draining: it finishes what it has, and takes no new requests"
            )

    async def wait_until_dead(self) -> EngineError:
        """See `EngineLife.wait_until_dead`."""
        return await self._life.wait_until_dead()

    async def health(self) -> Health:
        """See `AsyncLLMEngine.health`."""
        watch = self._link.watch
        if self.state is not EngineState.SERVING or watch is None:
            return Health(self.state.name.lower(), False, False, 0.0)
        pong = await watch.ask()
        state = "draining" if self._is_draining else self.state.name.lower()
        if pong is None:
            return Health(state, False, False, watch.last_step_age_s)
        age_s = max(pong.step_age_s, watch.last_step_age_s)
        is_ready = not self._is_draining and age_s <= self._link.patience.stalled_s
        return Health(state, True, is_ready, age_s)

    # ---- life

    async def start(self) -> None:
        """See `AsyncLLMEngine.start`."""
        if self._life.has_core:
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
        if self._starting is not None or self._life.has_core:
            raise RuntimeError("the engine is running already")
        # The state changes now, not when the task has its first turn: until then it may be shut
        # down, and started again.
        self._life.advance(EngineEvent.START)
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
            welcome = await self._link.start()
            self._require_wanted()
        except BaseException as error:
            self._require_wanted()
            self._link.release()
            self._starting = None
            if not self._link.is_own:
                # Somebody else's engine: it may be up the next time.
                self._life.advance(EngineEvent.GIVE_UP)
                raise
            self._life.die(
                error
                if isinstance(error, EngineError)
                else EngineStartError(f"start-up was interrupted: {error!r}")
            )
            raise
        self._starting = None
        self._succession.go_on(welcome)

    def stop(self, *, may_return: bool = False) -> None:
        """End it, from any state; streams end with `EngineClosedError`.

        Args:
            may_return: let the core keep what outlives a connection.
        """
        if may_return:
            self._send_notices()  # what was aborted is not to be kept
        self._life.stop()
        error = EngineClosedError("the engine was shut down")
        self._client.fail_all(error)
        self._calls.fail(error)
        self._succession.cancel()
        self._link.release(may_return=may_return)
        self._starting = None
        self._is_draining = False

    async def replace_core(self, args: EngineArgs) -> None:
        """See `AsyncLLMEngine.replace_core`."""
        await self._succession.replace(args)

    async def drain(self, timeout_s: float | None) -> None:
        """See `AsyncLLMEngine.drain`."""
        await self.ensure_started()
        self._is_draining = True
        reply = await self.call(lambda number: Drain(number, timeout_s))
        if not reply.ok:
            self._is_draining = False
            raise EngineError(f"the engine does not drain: {reply.message}")

    def _is_waited_for(self) -> bool:
        return bool(self._is_always_watching or self._client.num_live or self._calls)

    # ---- what goes to the core

    def send(self, message: Message, *, gather: bool = False) -> None:
        """Queue one message about a request; never blocks. While the core is being replaced
        nothing is sent: the next one is told of all live requests.

        Args:
            gather: see `Connection.send`.

        Raises:
            EngineError: the engine is not serving.
            MessageTooLargeError: nothing was queued.
        """
        if self.state is EngineState.RESTARTING:
            return
        self.require_serving()
        watch = self._link.watch
        assert watch is not None
        self._send_notices()  # a request must not overtake what was said before
        self._link.send(message, gather=gather)
        watch.wake()

    def _send_notices_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # whoever leaves a stream here, there are no others
            self._send_notices()
        else:
            loop.call_soon(self._send_notices)

    def _send_notices(self) -> None:
        if self.state is EngineState.SERVING:
            for notice in self._client.notices.take():
                self._link.send(notice)

    async def has_room(self) -> None:
        """Wait until the core has taken what `send` could not get rid of."""
        await self._link.has_room()

    async def call(self, make: Callable[[int], ControlCall]) -> ControlReply:
        """Make a control call and wait for its answer, from this core or from one that takes its
        place.

        Args:
            make: the message, given its number.
        """
        await self.ensure_started()
        return await self._calls.call(make, self.send)

    # ---- what the core says

    def _on_messages(self, messages: list[CoreMessage]) -> None:
        now = time.monotonic()
        over: list[int] = []
        for message in messages:
            match message:
                case StepOutputs():
                    if not self._succession.accepts(message):
                        continue
                    try:
                        over += self._client.handle(message, now)
                    except ValueError as error:
                        why = f"the engine core sent outputs that make no sense: {error}"
                        self._link.lose(Loss(why, LossKind.FAILED))
                        return
                case Attached():
                    over += self._client.attach(message, now)
                case Pong():
                    if self._link.watch is not None:
                        self._link.watch.hear(message)
                case ControlReply():
                    self._calls.answer(message)
                case EngineFailed(cause=cause):
                    self._link.lose(Loss(cause, LossKind.FAILED))
                    return
                case EngineStopping(reason=reason):
                    # What our own core was not told by us is as good as its death.
                    if not self._link.is_own and self.state is EngineState.SERVING:
                        end = EngineDeadError(f"the engine was stopped: {reason}")
                        self._succession.die(end)
                        return
                case Refused(kind="superseded"):
                    # Coming back would take it from the other, which would do the same.
                    self._succession.die(
                        EngineDeadError(
                            "another engine object has connected with the same client key, and "
                            "has taken this one's place"
                        )
                    )
                    return
                case _:
                    logger.warning("unexpected %s on the output socket", type(message).__name__)
        if over and self._link.is_connected:
            self._link.send(AbortRequests(over))

    def _on_lost(self, loss: Loss) -> None:
        self._succession.lose(loss)

    def _report_progress(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress.phase, progress.fraction)


def _retrieve_error(task: "asyncio.Task[None]") -> None:
    """Whoever waits for a start is told how it ended; that nobody waits is nothing to log."""
    if not task.cancelled():
        task.exception()
