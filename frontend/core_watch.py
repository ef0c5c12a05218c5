"""Feels the pulse of one core over its connection, for as long as somebody waits for it."""

import asyncio
import time
from collections.abc import Callable

from footplate.frontend.connection import Connection
from footplate.frontend.watchdog import Patience, Verdict, Watchdog
from footplate.protocol.messages import Ping, Pong


class CoreWatch:
    """Owns the timer between two pings, and who waits for an answer to one.

    An idle engine is not pinged: it is to use no CPU, and nothing waits for it. Use from one event
    loop.
    """

    def __init__(
        self,
        connection: Connection,
        patience: Patience,
        is_needed: Callable[[], object],
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        """Args:
        is_needed: whether there is any reason to go on watching; asked at every beat.
        on_verdict: told what the watchdog finds, at every beat.
        """
        self._connection = connection
        self._patience = patience
        self._is_needed = is_needed
        self._on_verdict = on_verdict
        self._watchdog = Watchdog(patience)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_pings = 0
        self._answers: dict[int, asyncio.Future[Pong | None]] = {}

    @property
    def last_step_age_s(self) -> float:
        """Seconds since the core is known to have got further; 0 when it is idle."""
        return self._watchdog.last_step_age_s

    def wake(self) -> None:
        """Somebody waits for the core from now on."""
        if self._timer is None:
            self._beat()

    def _beat(self) -> None:
        if not self._is_needed():
            self._timer = None
            self._watchdog.rest()
            return
        # First, so that whoever is told may stop it.
        self._timer = self._loop.call_later(self._patience.beat_s, self._beat)
        verdict = self._watchdog.tick(time.monotonic())
        self._ping()
        self._on_verdict(verdict)

    def _ping(self) -> int:
        self._num_pings += 1
        self._connection.send_now(Ping(self._num_pings))
        return self._num_pings

    def hear(self, pong: Pong) -> None:
        """The core has answered."""
        self._watchdog.hear(pong)
        answer = self._answers.get(pong.number)
        if answer is not None and not answer.done():
            answer.set_result(pong)

    async def ask(self) -> Pong | None:
        """The core's answer to a ping of now; None if it gives none in time, or is watched no
        longer."""
        number = self._ping()
        answer: asyncio.Future[Pong | None] = self._loop.create_future()
        self._answers[number] = answer
        try:
            async with asyncio.timeout(self._patience.silent_s):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._answers[number]

    def stop(self) -> None:
        """Watch no longer; whoever waits for an answer gets none."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for answer in self._answers.values():
            if not answer.done():
                # Not cancelled: whoever waits would take that for its own end.
                answer.set_result(None)
