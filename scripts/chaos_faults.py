"""What may happen to an engine core that works, done on purpose and waited out."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Protocol

import psutil

from chaos_load import Load
from footplate.frontend import AsyncLLMEngine, Restart
from fuzz_sockets import BadFrames, HostileClient

FAIL_POINTS = "FOOTPLATE_FAIL_POINTS"
RECOVERY_S = 120.0  # a core that has not come back by then is a failure of the whole run
# Requests that took part in a fatal step are run alone until each has a token: a core that ends
# itself before they have is one that a request has ended, as far as anybody can tell.
FIRST_FATAL_STEP = 400
BURST_FRAMES = 200
# Of deaths of a core, how many its spare dies a little before, and how many a little behind it,
# while it is being promoted.
SPARE_DIES = 0.2
SPARE_DIES_WITHIN_S = 0.3


class Fault(Protocol):
    """One kind of accident. Owns its dice.

    Attributes:
        engine_args: that the engine needs for it.
    """

    engine_args: dict[str, Any]

    def arm(self) -> None:
        """Called before a core starts."""
        ...

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: "Restarts") -> float:
        """Do it, and return when streams go on: seconds without a token, from the moment at which
        there could have been one."""
        ...


class Restarts:
    """Owns what an engine tells of its restarts. Its `note` is the engine's `on_restart`."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._came = asyncio.Event()
        self.records: list[Restart] = []

    def note(self, restart: Restart) -> None:
        """A core has been replaced."""
        self.records.append(restart)
        self._came.set()
        self._fault.arm()

    async def wait_for(self, count: int) -> None:
        """Wait until there have been so many."""
        async with asyncio.timeout(RECOVERY_S):
            while len(self.records) < count:
                self._came.clear()
                await self._came.wait()


class Kill:
    """SIGKILL, as a system that runs out of memory sends it."""

    def __init__(self, dice: Random) -> None:
        self.engine_args: dict[str, Any] = {}

    def arm(self) -> None:
        """Nothing to do."""

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: Restarts) -> float:
        """From the signal to the next token."""
        assert engine.process_id is not None
        count, since = len(restarts.records), time.monotonic()
        with suppress(ProcessLookupError):  # it has just died of something else
            os.kill(engine.process_id, signal.SIGKILL)
        await restarts.wait_for(count + 1)
        await load.next_token(RECOVERY_S)
        return time.monotonic() - since


class KillWithSpare:
    """The core is killed, and now and then its spare as well."""

    def __init__(self, dice: Random) -> None:
        self.engine_args: dict[str, Any] = {}
        self.num_spares_killed = 0
        self._kill = Kill(dice)
        self._dice = dice

    def arm(self) -> None:
        """Nothing to do."""

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: Restarts) -> float:
        """From the signal to the core to the next token."""
        core, chance = engine.process_id, self._dice.random()
        assert core is not None
        delay_s = self._dice.uniform(0.0, SPARE_DIES_WITHIN_S)
        if chance < SPARE_DIES:
            self._kill_spares(core)
            await asyncio.sleep(delay_s)
        behind = None
        if SPARE_DIES <= chance < 2 * SPARE_DIES:
            behind = asyncio.get_running_loop().call_later(delay_s, self._kill_spares, core)
        try:
            return await self._kill.strike(engine, load, restarts)
        finally:
            if behind is not None:
                behind.cancel()

    def _kill_spares(self, core: int) -> None:
        with suppress(psutil.NoSuchProcess):  # others end at such moments, too
            for spare in spares_of(core):
                spare.kill()
                self.num_spares_killed += 1


def spares_of(core: int) -> Iterator[psutil.Process]:
    """Live processes below this one that have no children and are not the core."""
    tree = psutil.Process().children(recursive=True)
    others = {core, *(process.ppid() for process in tree)}
    for process in tree:
        if process.pid not in others and process.status() != psutil.STATUS_ZOMBIE:
            yield process


class Stop:
    """SIGSTOP, and after a while SIGCONT: a debugger, a laptop, a busy hypervisor."""

    def __init__(self, dice: Random) -> None:
        self.engine_args: dict[str, Any] = {}
        self._dice = dice

    def arm(self) -> None:
        """Nothing to do."""

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: Restarts) -> float:
        """From the second signal to the next token."""
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._dice.uniform(0.05, 2.0))
        finally:
            os.kill(engine.process_id, signal.SIGCONT)
        since = time.monotonic()
        await load.next_token(RECOVERY_S)
        return time.monotonic() - since


class FailPoint:
    """The core does something to itself, in one of its next thousand steps.

    Args:
        rules: any of these, each without its passage.
    """

    def __init__(self, dice: Random, rules: Sequence[str]) -> None:
        self.engine_args: dict[str, Any] = {"stall_timeout_s": 0.5, "hang_timeout_s": 1.0}
        self._dice = dice
        self._rules = rules
        self._others = os.environ.get(FAIL_POINTS, "")

    def arm(self) -> None:
        """Leave word for the next core, which inherits the environment."""
        passage = FIRST_FATAL_STEP + self._dice.randrange(600)
        os.environ[FAIL_POINTS] = f"{self._others};{self._dice.choice(self._rules)}@{passage}"

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: Restarts) -> float:
        """From the last token of one core to the first of the next."""
        load.take_longest_gap()
        await restarts.wait_for(len(restarts.records) + 1)
        await load.next_token(RECOVERY_S)
        return load.take_longest_gap()


class Garbage:
    """Bad frames at the core's socket, from strangers and from clients that have said hello."""

    def __init__(self, dice: Random) -> None:
        self.engine_args: dict[str, Any] = {}
        self._dice = dice
        self._frames = BadFrames(dice.randrange(2**32))

    def arm(self) -> None:
        """Nothing to do."""

    async def strike(self, engine: AsyncLLMEngine, load: Load, restarts: Restarts) -> float:
        """From the last of the frames to the next token."""
        assert engine.process_id is not None
        joins = self._dice.random() < 0.5
        hostile = HostileClient(f"ipc://{socket_of(engine.process_id)}", joins=joins)
        for _ in range(BURST_FRAMES):
            await hostile.send(self._frames.next_for(joined=joins))
        await hostile.leave()
        since = time.monotonic()
        await load.next_token(RECOVERY_S)
        return time.monotonic() - since


def socket_of(core: int) -> Path:
    """Where a core listens, as the system tells (Linux)."""
    paths = {
        Path(link.laddr) for link in psutil.Process(core).net_connections("unix") if link.laddr
    }
    return next(path for path in paths if path.name == "engine.sock")


def make_fault(name: str, dice: Random, *, has_spare: bool = False) -> Fault:
    """The fault of this name.

    Args:
        has_spare: whether the engine keeps a spare core, which dies as well then.
    """
    match name:
        case "core" if has_spare:
            return KillWithSpare(dice)
        case "core":
            return Kill(dice)
        case "stop":
            return Stop(dice)
        case "hang":
            hangs = ("core.step:hang", "core.step:hang_gil", "core.outputs:hang")
            return FailPoint(dice, hangs)
        case "crash":
            crashes = (
                *("core.step:segfault", "runner.execute:exit=3", "core.outputs:kill"),
                *("core.outputs:raise", "core.sent:exit=0", "core.sent:raise"),
            )
            return FailPoint(dice, crashes)
        case "garbage":
            return Garbage(dice)
    raise ValueError(f"there is no fault {name!r}")
