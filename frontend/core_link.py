"""The core that an engine has now: its process, if that is our own, and the connection to it."""

import asyncio
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress

from footplate.frontend.connection import Connection
from footplate.frontend.core_watch import CoreWatch
from footplate.frontend.loss import Loss, LossKind
from footplate.frontend.supervisor import Supervisor
from footplate.frontend.watchdog import Patience, Verdict
from footplate.frontend.weak_callbacks import weakly, weakly_soon
from footplate.protocol.errors import EngineStartError
from footplate.protocol.keys import ClientKeys
from footplate.protocol.links import new_session
from footplate.protocol.messages import CoreMessage, Message, Progress, Welcome

logger = logging.getLogger(__name__)

OWN_CORE_EXIT_S = 1.0


def _ignore(news: object) -> None:
    pass


class CoreLink:
    """Owns the supervisor of a core of our own, the connection to a core, and the watch over it.

    There is one core at a time, and one connection; either may be followed by another. Knows
    nothing of requests, nor of the engine's life. Whoever drops it drops its core. Use from one
    event loop at a time.
    """

    def __init__(
        self,
        supervisor: Supervisor | None,
        address: str | None,
        start_timeout_s: float,
        *,
        patience: Patience = Patience(),  # noqa: B008 (frozen)
        keys: ClientKeys | None = None,
        name: bytes | None = None,
        is_waited_for: Callable[[], bool] = lambda: False,
        on_messages: Callable[[list[CoreMessage]], None] = _ignore,
        on_lost: Callable[[Loss], None] = _ignore,
        on_progress: Callable[[Progress], None] = _ignore,
    ) -> None:
        """Args:
        supervisor: of a core of our own; with None somebody else's is at `address`.
        start_timeout_s: for a core to be ready, the first one and each that takes its place.
        keys: for the connection, if that is encrypted.
        name: of the client, to be known by over its next connection; None makes one up.
        is_waited_for: whether the core is to be watched over at the moment.
        on_messages: given all that one wake-up of the event loop brought.
        on_lost: told once that a core that served does so no longer, and is still connected to.
        """
        self._supervisor = supervisor
        self._address = address
        self._start_timeout_s = start_timeout_s
        self._patience = patience
        self._keys = keys
        self._name = name or new_session()
        self._is_waited_for = is_waited_for
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._connection: Connection | None = None
        self._watch: CoreWatch | None = None
        self._losing: asyncio.TimerHandle | None = None
        self._intruded: asyncio.Future[EngineStartError] | None = None
        self._finalizer: weakref.finalize[..., CoreLink] | None = None

    @property
    def is_own(self) -> bool:
        """Whether the core is a child of this process, to be replaced by it."""
        return self._supervisor is not None

    @property
    def has_ended(self) -> bool:
        """Whether a core of our own has ended, and no other has taken its place."""
        return self._supervisor is not None and self._supervisor.has_ended

    @property
    def start_timeout_s(self) -> float:
        """How long a core may take to be ready."""
        return self._start_timeout_s

    @property
    def patience(self) -> Patience:
        """With which the core is watched."""
        return self._patience

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to send by."""
        return self._connection is not None

    @property
    def watch(self) -> CoreWatch | None:
        """Over the core that serves; None when none does."""
        return self._watch

    # ---- a core comes

    async def start(self) -> Welcome:
        """Start a core of our own, or find somebody else's.

        Raises:
            EngineStartError: with the root cause.
        """
        if self._supervisor is not None:
            self._supervisor.listen(weakly_soon(self._on_core_exit))
            self._address = self._supervisor.start()
            # Until the core is there to say how far it is.
            self._on_progress(Progress("importing", 0.0))
        return await self.connect(self._start_timeout_s)

    async def restart(self, cause: str, *, had_served: bool, has_failed: bool) -> None:
        """Replace a core of our own, which may be connected to then; see `Supervisor.restart`."""
        assert self._supervisor is not None
        await self._supervisor.restart(cause, had_served=had_served, has_failed=has_failed)

    async def connect(self, timeout_s: float) -> Welcome:
        """Connect to the core at the address, and wait until it is ready.

        Raises:
            EngineStartError: there is none, or it could not start.
        """
        assert self._address is not None
        # Callbacks must not keep a dropped engine alive: the event loop holds them.
        self._connection = Connection(
            self._address,
            self._name,
            on_messages=self._on_messages,
            on_lost=weakly(self._on_connection_lost),
            on_progress=self._on_progress,
            keys=self._keys,
        )
        welcome = await self._connection.open(timeout_s)
        if self._supervisor is not None and not await self._supervisor.owns(welcome.process_id):
            # Another core holds the address and has answered; ours is about to find out.
            self._intruded = asyncio.get_running_loop().create_future()
            raise await self._intruded
        return welcome

    def serve(self) -> None:
        """The core serves: watch over it, and clean up behind an engine that is only dropped."""
        assert self._connection is not None
        if self._supervisor is not None:
            self._supervisor.stand_by()
        self._watch = CoreWatch(
            self._connection,
            self._patience,
            is_needed=self._is_waited_for,
            on_verdict=weakly(self._on_verdict),
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

    def take_over(self, other: "CoreLink") -> "asyncio.Future[None]":
        """Make another link's core ours, to be connected to; that link has none any more.

        Returns:
            The end of the core that was ours, which takes a moment.
        """
        assert self._supervisor is not None and other._supervisor is not None
        self.disconnect()
        other.disconnect(takes_leave=True)
        predecessor, self._supervisor = self._supervisor, other._supervisor
        other._supervisor = None
        self._address = other._address
        self._start_timeout_s, self._patience = other._start_timeout_s, other._patience
        self._supervisor.listen(weakly_soon(self._on_core_exit))
        return asyncio.get_running_loop().run_in_executor(None, predecessor.stop)

    # ---- a core goes

    def lose(self, loss: Loss) -> None:
        """The core is gone, or of no use any more. If it had begun to serve, whoever is to know is
        told; otherwise `connect` fails."""
        if self._watch is not None:
            self._on_lost(loss)
        elif self._connection is not None:
            self._connection.refuse(EngineStartError(loss.cause))

    def _on_connection_lost(self, loss: Loss) -> None:
        # The end of a core of our own is explained better, and about as fast, by its process.
        waits = self._supervisor is not None and loss.kind is LossKind.GONE
        loop, lose = asyncio.get_running_loop(), weakly(self.lose)
        delay_s = OWN_CORE_EXIT_S if waits else 0.0
        self._losing = self._losing or loop.call_later(delay_s, lose, loss)

    def _on_core_exit(self, error: EngineStartError) -> None:
        if self._supervisor is None or not self._supervisor.has_ended:
            return  # it is about a core that has been replaced since
        if self._intruded is not None and not self._intruded.done():
            self._intruded.set_result(error)
        elif self._watch is not None:
            self._on_lost(Loss(self._supervisor.explain(error)))
        elif self._connection is not None:
            self._connection.refuse(error)

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

    def disconnect(self, *, takes_leave: bool = False, may_return: bool = False) -> None:
        """End the connection, if there is one; see `Connection.close`."""
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

    def release(self, *, may_return: bool = False) -> None:
        """Take leave, and end the core if it is our own. May be called more than once.

        Args:
            may_return: let the core keep what outlives a connection.
        """
        self.disconnect(takes_leave=True, may_return=may_return)
        if self._supervisor is not None:
            self._supervisor.stop()

    # ---- what goes to the core

    def send(self, message: Message, *, gather: bool = False) -> None:
        """See `Connection.send`. It is a bug to send without a connection."""
        assert self._connection is not None
        self._connection.send(message, gather=gather)

    async def has_room(self) -> None:
        """Wait until the core has taken what `send` could not get rid of."""
        if self._connection is not None:
            await self._connection.has_room()


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
