"""One engine from its start to its end, as its client lives through it.

Starts a core or attaches to one, carries messages both ways, and when the core is gone finds
another and gives it every live request. What the messages mean to a request is `EngineClient`'s
business.
"""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TypeVar

from footplate.frontend.connection import Connection
from footplate.frontend.control_calls import ControlCall, ControlCalls
from footplate.frontend.core_watch import CoreWatch
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_state import EngineEvent, EngineState, advance
from footplate.frontend.health import Health, Restart
from footplate.frontend.recovery import Recovery
from footplate.frontend.supervisor import Supervisor
from footplate.frontend.watchdog import Patience, Verdict
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineNotReadyError,
    EngineStartError,
    KeyRefusedError,
    MessageTooLargeError,
    ProtocolMismatchError,
    RequestFailedError,
)
from footplate.protocol.keys import ClientKeys
from footplate.protocol.links import new_session
from footplate.protocol.messages import (
    AbortRequests,
    Attached,
    ControlReply,
    CoreMessage,
    Drain,
    EngineFailed,
    EngineStopping,
    Message,
    ModelFacts,
    Pong,
    Progress,
    Refused,
    StepOutputs,
    Welcome,
)

logger = logging.getLogger(__name__)

OWN_CORE_EXIT_S = 1.0
REATTACH_S = 0.05  # from one attempt to the next

_WHY_CLOSED = {
    EngineState.NEW: "the engine has not been started: await start()",
    EngineState.STARTING: "the engine is still starting: await start()",
    EngineState.STOPPED: "the engine was shut down",
}

T = TypeVar("T")
ProgressCallback = Callable[[str, float], None]
RestartCallback = Callable[[Restart], None]


class Session:
    """Owns the state of an engine and the connection to it. Use from one event loop at a time.

    Attributes:
        state: where the engine is in its life.
        dead_error: why it died, if it did.
        num_restarts: cores that have been replaced.
    """

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
        self.state = EngineState.NEW
        self.dead_error: EngineError | None = None
        self.num_restarts = 0
        self._client = client
        self._supervisor = supervisor
        self._address = address
        self._start_timeout_s = start_timeout_s
        self._patience = patience
        self._is_always_watching = is_always_watching
        self._on_progress = on_progress
        self._on_restart = on_restart
        self._name = name or new_session()
        self._keys = keys
        self._starting: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._watch: CoreWatch | None = None
        self._replacing = asyncio.Lock()
        self._recovery = Recovery(client)
        self._calls = ControlCalls()
        self._owner: int | None = None
        self._losing: asyncio.TimerHandle | None = None
        self._intruded: asyncio.Future[EngineStartError] | None = None
        self._finalizer: weakref.finalize[..., Session] | None = None
        self._welcome: Welcome | None = None
        self._is_draining = False
        self._ended = asyncio.Event()
        send_soon = weakref.WeakMethod(self._send_notices_soon)
        client.notices.on_first = lambda: (send := send_soon()) is not None and send()

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

    @property
    def num_replayed(self) -> int:
        """Requests that were given to another core, all restarts together."""
        return self._recovery.num_replayed

    # ---- life

    async def start(self) -> None:
        """See `AsyncLLMEngine.start`."""
        if self.state in (EngineState.SERVING, EngineState.RESTARTING):
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
        if self._starting is not None or self.state in (
            EngineState.SERVING,
            EngineState.RESTARTING,
        ):
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
            if self._supervisor is not None:
                self._supervisor.listen(self._make_exit_callback())
                self._address = self._supervisor.start()
            welcome = await self._connect(self._start_timeout_s)
            self._require_wanted()
        except BaseException as error:
            self._require_wanted()
            self._release()
            self._starting = None
            if self._supervisor is None:
                # Somebody else's engine: it may be up the next time.
                self._advance(EngineEvent.GIVE_UP)
                raise
            self._end(
                error
                if isinstance(error, EngineError)
                else EngineStartError(f"start-up was interrupted: {error!r}")
            )
            raise
        self._starting = None
        self._go_on("", welcome)

    async def _connect(self, timeout_s: float) -> Welcome:
        assert self._address is not None
        # Callbacks must not keep a dropped engine alive: the event loop holds them.
        self._connection = Connection(
            self._address,
            self._name,
            on_messages=_weakly(self._on_messages),
            on_lost=_weakly(self._on_connection_lost),
            on_progress=_weakly(self._report_progress),
            keys=self._keys,
        )
        welcome = await self._connection.open(timeout_s)
        if self._supervisor is not None and not await self._supervisor.owns(welcome.process_id):
            # Another core holds the address and has answered; ours is about to find out.
            self._intruded = asyncio.get_running_loop().create_future()
            raise await self._intruded
        return welcome

    def _become_ready(self) -> None:
        """A core serves: watch over it, and clean up behind an engine that is only dropped."""
        assert self._connection is not None
        if self._supervisor is not None:
            self._supervisor.stand_by()
        is_waited_for = weakref.WeakMethod(self._is_waited_for)
        self._watch = CoreWatch(
            self._connection,
            self._patience,
            is_needed=lambda: (ask := is_waited_for()) is not None and ask(),
            on_verdict=_weakly(self._on_verdict),
        )
        self._watch.wake()
        self._finalizer = weakref.finalize(
            self,
            _release_later,
            asyncio.get_running_loop(),
            self._watch,
            self._connection,
            self._supervisor,
        )

    def _is_waited_for(self) -> bool:
        return bool(self._is_always_watching or self._client.num_live or self._calls)

    def _make_exit_callback(self) -> Callable[[EngineStartError], None]:
        loop, tell = asyncio.get_running_loop(), _weakly(self._on_core_exit)

        def on_exit(error: EngineStartError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(tell, error)

        return on_exit

    def stop(self, *, may_return: bool = False) -> None:
        """End it, from any state; streams end with `EngineClosedError`.

        Args:
            may_return: let the core keep what outlives a connection.
        """
        if may_return:
            self._send_notices()  # what was aborted is not to be kept
        self._advance(EngineEvent.STOP)
        error = EngineClosedError("the engine was shut down")
        self._client.fail_all(error)
        self._calls.fail(error)
        if self._recovering is not None:
            with suppress(RuntimeError):  # the loop is closed already
                self._recovering.cancel()
            self._recovering = None
        self._release(may_return=may_return)
        self._starting = None
        self._is_draining = False
        self.dead_error = None

    def _release(self, *, may_return: bool = False) -> None:
        self._disconnect(takes_leave=True, may_return=may_return)
        if self._supervisor is not None:
            self._supervisor.stop()

    def _disconnect(self, *, takes_leave: bool = False, may_return: bool = False) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._losing is not None:
            self._losing.cancel()  # it means this core, not one that comes later
            self._losing = None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._connection is not None:
            self._connection.close(takes_leave=takes_leave, may_return=may_return)
            self._connection = None

    def _advance(self, event: EngineEvent) -> None:
        self.state = advance(self.state, event)

    def require_serving(self) -> None:
        """Raise the `EngineError` that says why requests cannot be served now, if so."""
        if self.dead_error is not None:
            raise self.dead_error
        if self.state is EngineState.RESTARTING:
            raise EngineNotReadyError("the engine core is being replaced: streams go on with it")
        if self.state is not EngineState.SERVING:
            raise EngineClosedError(_WHY_CLOSED[self.state])

    def require_open(self) -> None:
        """Raise EngineDrainingError if no new requests are taken."""
        if self._is_draining:
            raise EngineDrainingError(
                "the engine is draining: it finishes what it has, and takes no new requests"
            )

    async def wait_until_dead(self) -> EngineError:
        """Return why it has died, once it has."""
        await self._ended.wait()
        assert self.dead_error is not None
        return self.dead_error

    # ---- death and recovery

    def _on_connection_lost(self, cause: str) -> None:
        # The end of a core of our own is explained better, and about as fast, by its process.
        patience_s = 0.0 if self._supervisor is None else OWN_CORE_EXIT_S
        loop, lose = asyncio.get_running_loop(), _weakly(self._lose)
        self._losing = self._losing or loop.call_later(patience_s, lose, cause)

    def _on_core_exit(self, error: EngineStartError) -> None:
        if self._supervisor is None or not self._supervisor.has_ended:
            return  # it is about a core that has been replaced since
        if self._intruded is not None and not self._intruded.done():
            self._intruded.set_result(error)
        elif self.state is EngineState.SERVING:
            self._lose(self._supervisor.explain(error))
        elif self._connection is not None:
            self._connection.refuse(error)

    def _lose(self, cause: str, *, has_failed: bool = False) -> None:
        """The core is gone, or of no use any more."""
        if self.state is not EngineState.SERVING:
            if self._connection is not None:
                self._connection.refuse(EngineStartError(cause))
            return
        self._advance(EngineEvent.LOSE)
        logger.info("the engine core is gone, and is being replaced: %s", cause)
        self._disconnect()
        self._begin_to_recover(self._recover(cause, has_failed))

    def _begin_to_recover(self, recovery: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        self._recovering = asyncio.create_task(recovery, name="footplate recovery")
        self._recovering.add_done_callback(self._on_recovery_end)
        return self._recovering

    def _on_recovery_end(self, task: "asyncio.Task[None]") -> None:
        """Streams wait for nothing else: no recovery may end without their being told."""
        if task.cancelled():
            if task is self._recovering:  # not by us: by somebody who ends all tasks, perhaps
                self._die(EngineDeadError("the recovery from the core's end was cancelled"))
        elif (error := task.exception()) is not None:
            logger.error("the recovery from the core's end has failed", exc_info=error)
            if self.state in (EngineState.RESTARTING, EngineState.SERVING):
                self._die(EngineDeadError(f"the engine core cannot be replaced: {error!r}"))

    async def _recover(self, cause: str, has_failed: bool) -> None:
        since = time.monotonic()
        try:
            if self._supervisor is None:
                welcome = await self._attach_again(cause)
            else:
                welcome = await self._start_another(self._supervisor, cause, has_failed)
            _require_same_model(self.welcome.model, welcome.model)
        except EngineError as error:
            self._die(error)
            return
        except Exception as error:
            logger.exception("the engine core cannot be replaced")
            self._die(EngineDeadError(f"{cause}; it could not be replaced: {error!r}"))
            return
        self._recovering = None
        num_replayed = self._go_on(cause, welcome)
        self.num_restarts += 1
        seconds = time.monotonic() - since
        logger.warning(
            "engine core replaced in %.2f s, %d requests go on in it; the one before: %s",
            seconds,
            num_replayed,
            cause,
        )
        if self._on_restart is not None:
            try:
                self._on_restart(Restart(cause, self.num_restarts, num_replayed, seconds))
            except Exception:
                logger.exception("the callback on_restart failed")

    def _go_on(self, cause: str, welcome: Welcome) -> int:
        """Serve with the core that has come; how many requests go on in it."""
        self._welcome = welcome
        self._advance(EngineEvent.READY)
        num_replayed = self._replay(cause, welcome)
        self._become_ready()
        return num_replayed

    async def _start_another(self, supervisor: Supervisor, cause: str, has_failed: bool) -> Welcome:
        had_served = True
        while True:
            await supervisor.restart(cause, had_served=had_served, has_failed=has_failed)
            try:
                return await self._connect(self._start_timeout_s)
            except ProtocolMismatchError:
                raise  # another version was installed meanwhile; trying again is no help
            except EngineStartError as error:
                self._disconnect()
                cause, had_served, has_failed = str(error), False, False

    async def _attach_again(self, cause: str) -> Welcome:
        """Wait until whoever runs the engine has replaced its core."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            try:
                return await self._connect(max(REATTACH_S, deadline - time.monotonic()))
            except (ProtocolMismatchError, KeyRefusedError) as error:
                raise EngineDeadError(
                    f"{cause}; it cannot be attached to again: {error}"
                ) from error
            except EngineStartError:
                self._disconnect()
                if time.monotonic() > deadline:
                    raise EngineDeadError(
                        f"{cause}; nothing took its place within {self._start_timeout_s:g} s"
                    ) from None
                await asyncio.sleep(REATTACH_S)

    async def replace_core(self, args: EngineArgs) -> None:
        """See `AsyncLLMEngine.replace_core`."""
        if self._supervisor is None:
            raise EngineError("only an engine with a core of its own can replace it")
        async with self._replacing:
            await self._replace_core(args)

    async def _replace_core(self, args: EngineArgs) -> None:
        self.require_serving()
        # An engine of its own until it is known to be of use.
        trial = Session(EngineClient(), Supervisor(args), None, args.start_timeout_s)
        try:
            await trial.start()
            trial.require_serving()
            _require_same_architecture(self.welcome.model, trial.welcome.model)
            if self.state not in (EngineState.SERVING, EngineState.RESTARTING):
                raise EngineClosedError("the engine ended while its core was being replaced")
            predecessor = self._take_over(trial)
        finally:
            trial.stop()
        self._patience = args.patience
        # Neither is the caller's to cancel any more.
        ending = asyncio.get_running_loop().run_in_executor(None, predecessor.stop)
        moving = self._begin_to_recover(self._move_over())
        await asyncio.wait((ending, moving))
        if self.state is not EngineState.RESTARTING:  # when that core has died, others may come
            self.require_serving()

    async def _move_over(self) -> None:
        try:
            welcome = await self._connect(self._start_timeout_s)
        except Exception as error:  # it has died meanwhile, like any other core
            self._disconnect()
            await self._recover(str(error), has_failed=False)
        else:
            self._recovering = None
            self._go_on("it was replaced on request", welcome)

    def _take_over(self, trial: "Session") -> Supervisor:
        """Make another session's core ours; what is left of our own is returned."""
        assert self._supervisor is not None and trial._supervisor is not None
        if self._recovering is not None:
            self._recovering.cancel()
            self._recovering = None
        if self.state is EngineState.SERVING:
            self._advance(EngineEvent.LOSE)
        self._disconnect()
        trial._disconnect(takes_leave=True)
        predecessor, self._supervisor = self._supervisor, trial._supervisor
        trial._supervisor = None
        self._address, self._welcome = trial._address, trial.welcome
        self._start_timeout_s = trial._start_timeout_s
        self._supervisor.listen(self._make_exit_callback())
        return predecessor

    def _replay(self, cause: str, welcome: Welcome) -> int:
        """Give the new core every live request, and how many those are."""
        assert self._connection is not None
        messages = self._recovery.welcome(welcome, time.monotonic(), cause)
        for message in messages:
            if not self._client.is_live(message.handle):
                continue  # a sibling could not be sent, which has ended the whole request
            try:
                self._connection.send(message)
            except MessageTooLargeError as error:  # its output has grown too large for a message
                self._client.fail(message.handle, RequestFailedError(str(error)))
        for call in self._calls.messages:
            self._connection.send(call)
        return len(messages)

    def _die(self, error: EngineError) -> None:
        """The core is gone for good."""
        self._recovering = None
        self._release()
        self._end(error)
        logger.error("the engine is dead: %s", error)
        self._client.fail_all(error)
        self._calls.fail(error)

    def _end(self, error: EngineError) -> None:
        self._advance(EngineEvent.DIE)
        self.dead_error = error
        self._ended.set()

    # ---- health

    def _on_verdict(self, verdict: Verdict) -> None:
        if verdict is Verdict.STALLED:
            seconds = self._patience.stalled_s
            logger.warning("the engine core has not got any further for %g s", seconds)
            if self._supervisor is not None:
                self._supervisor.dump_stacks()
        elif verdict is Verdict.HUNG and self._supervisor is not None:
            # Somebody else's core is somebody else's to end.
            seconds = self._patience.hung_s
            self._supervisor.kill(
                f"the engine core was ended because it had not got any further for {seconds:g} s"
            )

    async def health(self) -> Health:
        """See `AsyncLLMEngine.health`."""
        watch = self._watch
        if self.state is not EngineState.SERVING or watch is None:
            return Health(self.state.name.lower(), False, False, 0.0)
        pong = await watch.ask()
        state = "draining" if self._is_draining else self.state.name.lower()
        if pong is None:
            return Health(state, False, False, watch.last_step_age_s)
        age_s = max(pong.step_age_s, watch.last_step_age_s)
        is_ready = not self._is_draining and age_s <= self._patience.stalled_s
        return Health(state, True, is_ready, age_s)

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
        assert self._connection is not None and self._watch is not None
        self._send_notices()  # a request must not overtake what was said before
        self._connection.send(message, gather=gather)
        self._watch.wake()

    def _send_notices_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # whoever leaves a stream here, there are no others
            self._send_notices()
        else:
            loop.call_soon(self._send_notices)

    def _send_notices(self) -> None:
        if self.state is EngineState.SERVING and self._connection is not None:
            for notice in self._client.notices.take():
                self._connection.send(notice)

    async def has_room(self) -> None:
        """Wait until the core has taken what `send` could not get rid of."""
        if self._connection is not None:
            await self._connection.has_room()

    async def call(self, make: Callable[[int], ControlCall]) -> ControlReply:
        """Make a control call and wait for its answer, from this core or from one that takes its
        place.

        Args:
            make: the message, given its number.
        """
        await self.ensure_started()
        return await self._calls.call(make, self.send)

    async def drain(self, timeout_s: float | None) -> None:
        """See `AsyncLLMEngine.drain`."""
        await self.ensure_started()
        self._is_draining = True
        reply = await self.call(lambda number: Drain(number, timeout_s))
        if not reply.ok:
            self._is_draining = False
            raise EngineError(f"the engine does not drain: {reply.message}")

    # ---- what the core says

    def _on_messages(self, messages: list[CoreMessage]) -> None:
        now = time.monotonic()
        over: list[int] = []
        for message in messages:
            match message:
                case StepOutputs():
                    if not self._recovery.accepts(message):
                        continue
                    try:
                        over += self._client.handle(message, now)
                    except ValueError as error:
                        self._lose(
                            f"the engine core sent outputs that make no sense: {error}",
                            has_failed=True,
                        )
                        return
                case Attached():
                    over += self._client.attach(message, now)
                case Pong():
                    if self._watch is not None:
                        self._watch.hear(message)
                case ControlReply():
                    self._calls.answer(message)
                case EngineFailed(cause=cause):
                    self._lose(cause, has_failed=True)
                    return
                case EngineStopping(reason=reason):
                    # What our own core was not told by us is as good as its death.
                    if self._supervisor is None and self.state is EngineState.SERVING:
                        self._die(EngineDeadError(f"the engine was stopped: {reason}"))
                        return
                case Refused(kind="superseded"):
                    # Coming back would take it from the other, which would do the same.
                    self._die(
                        EngineDeadError(
                            "another engine object has connected with the same client key, and "
                            "has taken this one's place"
                        )
                    )
                    return
                case _:
                    logger.warning("unexpected %s on the output socket", type(message).__name__)
        if over and self._connection is not None:
            self._connection.send(AbortRequests(over))

    def _report_progress(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress.phase, progress.fraction)


def _require_same_architecture(before: ModelFacts, after: ModelFacts) -> None:
    """What a core must have in common with the one before it, for streams to go on at all."""
    _require_equal("architecture", before.architecture, after.architecture)
    _require_equal("vocab_size", before.vocab_size, after.vocab_size)
    _require_equal("eos_token_ids", before.eos_token_ids, after.eos_token_ids)


def _require_same_model(before: ModelFacts, after: ModelFacts) -> None:
    """What it must have in common for streams to go on exactly."""
    _require_same_architecture(before, after)
    _require_equal("model", before.model, after.model)
    _require_equal("dtype", before.dtype, after.dtype)
    _require_equal("quantization", before.quantization, after.quantization)
    _require_equal("num_parameters", before.num_parameters, after.num_parameters)


def _require_equal(name: str, before: object, after: object) -> None:
    if before != after:
        raise EngineDeadError(
            f"the engine core came back with another model: {name} was {before!r}, is {after!r}"
        )


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
    loop: asyncio.AbstractEventLoop,
    watch: CoreWatch,
    connection: Connection,
    supervisor: Supervisor | None,
) -> None:
    """Clean up behind an engine that was dropped without shutdown, maybe by another thread."""
    if supervisor is not None:
        supervisor.stop()

    def disconnect() -> None:
        watch.stop()
        connection.close()

    with suppress(RuntimeError):
        loop.call_soon_threadsafe(disconnect)
