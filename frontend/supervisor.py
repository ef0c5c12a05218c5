"""Keeps an engine core running at one address: starts it, replaces it, ends it.

The same for an engine inside an application and for one that was launched: what differs is who
chose the address.
"""

import asyncio
import logging
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec

from footplate.frontend.core_process import CoreProcess
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.fork_server import ForkServer
from footplate.frontend.oom_kills import count_oom_kills
from footplate.frontend.restart_budget import RestartBudget
from footplate.frontend.shared_memory import SharedMemory
from footplate.frontend.weak_callbacks import weakly, weakly_soon
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import EngineDeadError, EngineStartError
from footplate.protocol.links import make_private_dir

logger = logging.getLogger(__name__)

# How a process ends that others have ended.
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


# For a fork server to make a process, which takes it some milliseconds.
FORK_TIMEOUT_S = 2.0


class _Listener:
    """Who is told of a core's end. A thread that waits for it holds this, and not its supervisor:
    that may be dropped."""

    def __init__(self) -> None:
        self.tell: Callable[[EngineStartError], object] = lambda error: None

    def __call__(self, error: EngineStartError) -> None:
        self.tell(error)


class Supervisor:
    """Owns the core's process, a spare one if there is to be one, the fork server that both come
    from, what they share, their private folder, and how often the core may still be replaced. Use
    from one event loop.

    Args:
        address: where the core listens; None makes a private folder for its socket.
        owner_key: this process's public key, where links have keys.
    """

    def __init__(self, args: EngineArgs, address: str | None = None, owner_key: str = "") -> None:
        self._args = args
        self._given_address = address
        self._owner_key = owner_key
        self._config: CoreConfig | None = None
        self._budget = RestartBudget(args.max_restarts, args.restart_window_s)
        self._fork_server: ForkServer | None = None
        self._process: CoreProcess | None = None
        self._listener = _Listener()
        self._shared: SharedMemory | None = None
        self._spare: CoreProcess | None = None
        self._spare_listener = _Listener()
        self._spare_budget = RestartBudget(args.max_restarts, args.restart_window_s)
        self._killed_for: str | None = None
        self._num_oom_kills = 0  # of the system, when the core was started
        self._folder: weakref.finalize[..., Supervisor] | None = None

    async def owns(self, process_id: int) -> bool:
        """Whether this is the core's process."""
        if self._process is None:
            return False
        # The core may have answered before its fork server has.
        return process_id == await asyncio.to_thread(self._process.wait_for_birth)

    @property
    def has_ended(self) -> bool:
        """Whether the core's process has ended, and no other has taken its place."""
        return self._process is not None and self._process.exit_status is not None

    def listen(self, on_exit: Callable[[EngineStartError], object]) -> None:
        """Say who is told, from now on, when a core has ended that was not told to.

        Args:
            on_exit: called from another thread; the error says why.
        """
        self._listener.tell = on_exit

    def start(self) -> str:
        """Start the core; its address."""
        address, folder = self._given_address, None
        self._shared = SharedMemory() if self._args.standby else None
        if address is None:
            folder = make_private_dir()
            address = f"ipc://{folder / 'engine.sock'}"
            self._folder = weakref.finalize(self, _remove, folder, os.getpid())
        self._config = self._args.core_config(
            address, None if folder is None else str(folder), self._owner_key
        )
        self._launch(has_crashed=False)
        return address

    def _launch(self, *, has_crashed: bool) -> None:
        assert self._config is not None
        self._killed_for = None
        self._num_oom_kills = count_oom_kills()
        config = msgspec.structs.replace(self._config, has_crashed=has_crashed)
        spare, self._spare = self._spare, None
        if spare is not None:
            # First: from now on its end is a core's.
            self._spare_listener.tell = self._listener
            if spare.exit_status is None and spare.wait_for_birth(0):
                spare.promote(config)
                self._process = spare
                return
        self._process = self._make_process(config, self._listener)

    def _make_process(self, config: CoreConfig, listener: _Listener) -> CoreProcess:
        if self._fork_server is None or not self._fork_server.is_alive:
            self._fork_server = ForkServer(config)
        return CoreProcess(config, listener, fork_server=self._fork_server, shared=self._shared)

    def stand_by(self) -> None:
        """The core serves: time to make a spare one ready, if there is to be one."""
        if self._args.standby and (self._spare is None or self._spare.exit_status is not None):
            assert self._config is not None
            self._spare_listener = _Listener()
            self._spare_listener.tell = weakly_soon(self._on_spare_end)
            config = msgspec.structs.replace(self._config, is_standby=True)
            try:
                self._spare = self._make_process(config, self._spare_listener)
            except OSError as error:  # too many processes, or no memory for one: none is spare
                logger.warning("no spare engine core can be started: %s", error)

    def _on_spare_end(self, error: EngineStartError) -> None:
        spare = self._spare
        if spare is None or spare.exit_status is None:
            return  # it is about one that another has followed
        logger.warning("the spare engine core has ended: %s", error)
        delay_s = self._spare_budget.spend(time.monotonic(), had_served=spare.is_standing_by)
        if delay_s is None:
            logger.warning("no other spare is started until the core is replaced")
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, weakly(self._replace_spare), spare)

    def _replace_spare(self, spare: CoreProcess) -> None:
        if self._spare is spare:  # nothing has come of the engine meanwhile
            self.stand_by()

    async def restart(self, cause: str, *, had_served: bool, has_failed: bool) -> None:
        """Replace a core that has ended, or is of no use any more.

        Args:
            cause: why it has ended.
            had_served: whether it was ever ready.
            has_failed: whether it has said so itself; otherwise its process tells.

        Raises:
            EngineDeadError: it has been replaced often enough.
        """
        assert self._process is not None
        delay_s = self._budget.spend(time.monotonic(), had_served=had_served)
        if delay_s is None:
            limit, window_s = self._args.max_restarts, self._args.restart_window_s
            raise EngineDeadError(
                f"{cause} (the core had been replaced {limit} times within {window_s:g} s, which "
                "is max_restarts)"
            )
        # Its memory and its address must be free before another can have them.
        await asyncio.to_thread(self._process.kill)
        has_crashed = has_failed or self._has_crashed()
        await asyncio.sleep(delay_s)
        server = self._fork_server
        knows_how = server is not None and server.is_ready
        self._launch(has_crashed=has_crashed)
        if knows_how and not await asyncio.to_thread(self._process.wait_for_birth, FORK_TIMEOUT_S):
            logger.warning("the fork server makes no process within %g s", FORK_TIMEOUT_S)
            await asyncio.to_thread(self._kill_fork_server)
            self._launch(has_crashed=has_crashed)

    def _kill_fork_server(self) -> None:
        """End one that is stopped or hung, and the core that it does not make."""
        if self._process is not None:
            self._process.kill()
        if self._fork_server is not None:
            self._fork_server.kill()
            self._fork_server = None

    def _has_crashed(self) -> bool:
        """Whether the core ended by itself. A hung one was ended by us, and not for nothing; and
        one may have asked for more memory than there is."""
        assert self._process is not None
        status = self._process.exit_status
        was_ended = status is not None and -status in _OUTSIDE
        ran_out = status == -signal.SIGKILL and count_oom_kills() > self._num_oom_kills
        return self._killed_for is not None or ran_out or not was_ended

    def explain(self, error: EngineStartError) -> str:
        """Why the core has ended, given what its process tells."""
        return self._killed_for or str(error)

    def dump_stacks(self) -> None:
        """Have the core write to its log where each of its threads is. It needs no turn of the
        interpreter for that."""
        if self._process is not None:
            self._process.signal(signal.SIGUSR1)

    def kill(self, cause: str) -> None:
        """End a core that hangs; whoever listens is told."""
        if self._process is not None:
            self._killed_for = cause
            self._process.signal(signal.SIGKILL)

    async def end(self) -> None:
        """Let the core take leave of its clients, and then end it."""
        if self._process is not None:
            await asyncio.to_thread(self._process.terminate)
        self.stop()

    def stop(self) -> None:
        """End the core at once. May be called more than once."""
        for process in (self._process, self._spare):
            if process is not None:
                process.stop()
        self._process = self._spare = None
        if self._fork_server is not None:
            self._fork_server.stop()
            self._fork_server = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None
        if self._folder is not None:
            self._folder()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of the owner, at whose end finalizers run as well
        shutil.rmtree(folder, ignore_errors=True)
