"""How an engine goes on when its core is gone, or is to be another."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress

from footplate.frontend.control_calls import ControlCalls
from footplate.frontend.core_link import CoreLink
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_life import EngineLife
from footplate.frontend.engine_state import EngineEvent, EngineState
from footplate.frontend.health import Restart
from footplate.frontend.loss import Loss, LossKind
from footplate.frontend.recovery import Recovery
from footplate.frontend.same_model import require_same_architecture, require_same_model
from footplate.frontend.supervisor import Supervisor
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    KeyRefusedError,
    MessageTooLargeError,
    ProtocolMismatchError,
    RequestFailedError,
)
from footplate.protocol.messages import StepOutputs, Welcome

logger = logging.getLogger(__name__)

REATTACH_S = 0.05  # from one attempt to the next
TAKE_BACK_S = 2.0  # a core that serves others answers a Hello at once, during a step as well

RestartCallback = Callable[[Restart], None]


class Succession:
    """Owns which core serves, the way from one to the next, and how many there have been. It gives
    each of them every live request and control call, or ends all of them when no other comes.

    Attributes:
        num_restarts: cores that have been replaced, and not on request. One that is only connected
            to again is none of them.
    """

    def __init__(
        self,
        life: EngineLife,
        link: CoreLink,
        client: EngineClient,
        calls: ControlCalls,
        on_restart: RestartCallback | None = None,
    ) -> None:
        """Args:
        life: told what becomes of the engine.
        link: by which cores come and go.
        client: asked what is to go on.
        calls: likewise.
        on_restart: told when streams go on in another core.
        """
        self.num_restarts = 0
        self._life = life
        self._link = link
        self._client = client
        self._calls = calls
        self._on_restart = on_restart
        self._recovery = Recovery(client)
        self._welcome: Welcome | None = None
        self._moving: asyncio.Task[None] | None = None
        self._replacing = asyncio.Lock()

    @property
    def welcome(self) -> Welcome | None:
        """What the core that serves said of itself, or the last one that did; None if none has."""
        return self._welcome

    @property
    def num_replayed(self) -> int:
        """See `Recovery`."""
        return self._recovery.num_replayed

    def accepts(self, outputs: StepOutputs) -> bool:
        """See `Recovery`."""
        return self._recovery.accepts(outputs)

    # ---- a core comes

    def go_on(self, welcome: Welcome, cause: str = "") -> int:
        """Serve with the core that is connected to.

        Args:
            cause: why there is another than before.

        Returns:
            How many requests go on in it.
        """
        self._moving = None
        self._welcome = welcome
        self._life.advance(EngineEvent.READY)
        num_replayed = self._replay(cause, welcome)
        self._link.serve()
        return num_replayed

    def _replay(self, cause: str, welcome: Welcome) -> int:
        """Give the new core every live request, and how many those are."""
        messages = self._recovery.welcome(welcome, time.monotonic(), cause)
        for message in messages:
            if not self._client.is_live(message.handle):
                continue  # a sibling could not be sent, which has ended the whole request
            try:
                self._link.send(message)
            except MessageTooLargeError as error:  # its output has grown too large for a message
                self._client.fail(message.handle, RequestFailedError(str(error)))
        for call in self._calls.replay():
            self._link.send(call)
        return len(messages)

    # ---- a core goes

    def lose(self, loss: Loss) -> None:
        """The core that served does so no longer: find another."""
        self._life.advance(EngineEvent.LOSE)
        logger.info("the engine core is gone, and is being replaced: %s", loss.cause)
        self._link.disconnect()
        self._move(self._recover(loss))

    def die(self, error: EngineError) -> None:
        """The core is gone for good."""
        self._moving = None
        self._link.release()
        self._life.die(error)
        logger.error("the engine is dead: %s", error)
        self._client.fail_all(error)
        self._calls.fail(error)

    def cancel(self) -> None:
        """Look for no other core."""
        moving, self._moving = self._moving, None
        if moving is not None:
            with suppress(RuntimeError):  # the loop is closed already
                moving.cancel()

    def _move(self, movement: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        self._moving = asyncio.create_task(movement, name="footplate recovery")
        self._moving.add_done_callback(self._on_end_of_move)
        return self._moving

    def _on_end_of_move(self, task: "asyncio.Task[None]") -> None:
        """Streams wait for nothing else: no recovery may end without their being told."""
        if task.cancelled():
            if task is self._moving:  # not by us: by somebody who ends all tasks, perhaps
                self.die(EngineDeadError("the recovery from the core's end was cancelled"))
        elif (error := task.exception()) is not None:
            logger.error("the recovery from the core's end has failed", exc_info=error)
            if self._life.has_core:
                self.die(EngineDeadError(f"the engine core cannot be replaced: {error!r}"))

    async def _recover(self, loss: Loss) -> None:
        before = self._welcome
        assert before is not None
        since = time.monotonic()
        try:
            welcome, cause = await self._next_core(loss)
            require_same_model(before.model, welcome.model)
        except EngineError as error:
            self.die(error)
            return
        except Exception as error:
            logger.exception("the engine core cannot be replaced")
            self.die(EngineDeadError(f"{loss.cause}; it could not be replaced: {error!r}"))
            return
        num_replayed = self.go_on(welcome, cause)
        seconds = time.monotonic() - since
        if welcome.epoch != before.epoch:
            self._report_restart(cause, num_replayed, seconds)
            return
        logger.warning(
            "the engine core is the same, connected to again in %.2f s, %d requests go on in it; "
            "the connection before: %s",
            seconds,
            num_replayed,
            cause,
        )

    def _report_restart(self, cause: str, num_replayed: int, seconds: float) -> None:
        self.num_restarts += 1
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

    async def _next_core(self, loss: Loss) -> tuple[Welcome, str]:
        """Find the core that streams go on in, the same or another, and why they had to."""
        cause = loss.cause
        if loss.kind is LossKind.DISMISSED and not self._recovery.has_heard:
            # It cannot tell us anything, and would dismiss us again and again.
            cause += ", before any output had come over the connection"
            if not self._link.is_own:
                raise EngineDeadError(f"{cause}: it is of no use to connect to it again")
        elif not self._link.is_own:
            return await self._attach_again(cause), cause
        elif loss.kind is LossKind.DISMISSED and not self._link.has_ended:
            # It was our own fault: its model and its cache are as good as before.
            try:
                return await self._link.connect(TAKE_BACK_S), cause
            except EngineStartError as error:
                self._link.disconnect()
                cause += f", and the engine core did not take the client back: {error}"
        has_failed = loss.kind is LossKind.FAILED
        return await self._start_another(cause, has_failed=has_failed), cause

    async def _start_another(self, cause: str, *, has_failed: bool) -> Welcome:
        had_served = True
        while True:
            await self._link.restart(cause, had_served=had_served, has_failed=has_failed)
            try:
                return await self._link.connect(self._link.start_timeout_s)
            except ProtocolMismatchError:
                raise  # another version was installed meanwhile; trying again is no help
            except EngineStartError as error:
                self._link.disconnect()
                cause, had_served, has_failed = str(error), False, False

    async def _attach_again(self, cause: str) -> Welcome:
        """Wait until whoever runs the engine has replaced its core."""
        timeout_s = self._link.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await self._link.connect(max(REATTACH_S, deadline - time.monotonic()))
            except (ProtocolMismatchError, KeyRefusedError) as error:
                raise EngineDeadError(
                    f"{cause}; it cannot be attached to again: {error}"
                ) from error
            except EngineStartError:
                self._link.disconnect()
                if time.monotonic() > deadline:
                    raise EngineDeadError(
                        f"{cause}; nothing took its place within {timeout_s:g} s"
                    ) from None
                await asyncio.sleep(REATTACH_S)

    # ---- another core on request

    async def replace(self, args: EngineArgs) -> None:
        """See `AsyncLLMEngine.replace_core`."""
        if not self._link.is_own:
            raise EngineError("only an engine with a core of its own can replace it")
        async with self._replacing:
            await self._replace(args)

    async def _replace(self, args: EngineArgs) -> None:
        self._life.require_serving()
        assert self._welcome is not None
        # A link of its own until it is known to be of use.
        trial = CoreLink(Supervisor(args), None, args.start_timeout_s, patience=args.patience)
        try:
            welcome = await trial.start()
            require_same_architecture(self._welcome.model, welcome.model)
            if not self._life.has_core:
                raise EngineClosedError("the engine ended while its core was being replaced")
            self.cancel()
            if self._life.state is EngineState.SERVING:
                self._life.advance(EngineEvent.LOSE)
            ending = self._link.take_over(trial)
            self._welcome = welcome
        finally:
            trial.release()
        # Neither is the caller's to cancel any more.
        moving = self._move(self._move_over())
        await asyncio.wait((ending, moving))
        if self._life.state is not EngineState.RESTARTING:  # when that core has died, others come
            self._life.require_serving()

    async def _move_over(self) -> None:
        try:
            welcome = await self._link.connect(self._link.start_timeout_s)
        except Exception as error:  # it has died meanwhile, like any other core
            self._link.disconnect()
            await self._recover(Loss(str(error)))
        else:
            self.go_on(welcome, "it was replaced on request")
