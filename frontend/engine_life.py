"""Where one engine is in its life, and what whoever wants something of it is told."""

import asyncio

from footplate.frontend.engine_state import EngineEvent, EngineState, advance
from footplate.protocol.errors import EngineClosedError, EngineError, EngineNotReadyError

_WHY_CLOSED = {
    EngineState.NEW: "the engine has not been started: await start()",
    EngineState.STARTING: "the engine is still starting: await start()",
    EngineState.STOPPED: "the engine was shut down",
}


class EngineLife:
    """Owns the state of an engine, and why it died.

    Attributes:
        state: where it is.
        dead_error: why it died, if it did.
    """

    def __init__(self) -> None:
        self.state = EngineState.NEW
        self.dead_error: EngineError | None = None
        self._ended = asyncio.Event()

    @property
    def has_core(self) -> bool:
        """Whether a core serves, or another is on its way."""
        return self.state in (EngineState.SERVING, EngineState.RESTARTING)

    def advance(self, event: EngineEvent) -> None:
        """Apply one event that does not end it."""
        self.state = advance(self.state, event)

    def die(self, error: EngineError) -> None:
        """It has ended without being asked to."""
        self.advance(EngineEvent.DIE)
        self.dead_error = error
        self._ended.set()

    def stop(self) -> None:
        """Its owner has ended it, in whatever state it was. It may be started again."""
        self.advance(EngineEvent.STOP)
        self.dead_error = None
        # Whoever waits for the end waits for that of this life.
        self._ended.set()
        self._ended = asyncio.Event()

    def require_serving(self) -> None:
        """Raise the `EngineError` that says why requests cannot be served now, if so."""
        if self.dead_error is not None:
            raise self.dead_error
        if self.state is EngineState.RESTARTING:
            raise EngineNotReadyError("the engine core is being replaced: streams go on with it")
        if self.state is not EngineState.SERVING:
            raise EngineClosedError(_WHY_CLOSED[self.state])

    async def wait_until_dead(self) -> EngineError:
        """Return why it has died, once it has.

        Raises:
            EngineClosedError: its owner has shut it down.
        """
        await self._ended.wait()
        if self.dead_error is None:
            raise EngineClosedError(_WHY_CLOSED[EngineState.STOPPED])
        return self.dead_error
