"""Who starts cores, watches them, and ends those that hang. Real budget, real watchdog."""

from collections import Counter
from collections.abc import Callable
from random import Random

from footplate.frontend.restart_budget import RestartBudget
from footplate.frontend.watchdog import Patience, Verdict, Watchdog
from footplate.protocol.messages import PROTOCOL_VERSION, Hello, Ping, Pong

from .core_host import CoreHost, Obituary, Setting
from .link import Link, decode_of_core

# As in production, but that a hang is not so long.
PATIENCE = Patience(beat_s=0.25, silent_s=1.0, stalled_s=2.0, hung_s=6.0)
WINDOW_S = 60.0
# From the moment in which a step hangs: what is rounded up to a beat, and one that is lost.
SLACK_S = 4 * PATIENCE.beat_s


class Supervisor:
    """Owns the core that there is, if there is one, and the time of the next.

    Attributes:
        host: None between two cores.
        is_spent: there will be no other.
        progress: of that core.
    """

    def __init__(
        self, setting: Setting, clock: Callable[[], float], random: Random, max_restarts: int
    ) -> None:
        self.host: CoreHost | None = None
        self.is_spent = False
        self.max_restarts = max_restarts
        self.happened: Counter[str] = Counter()
        self._setting = setting
        self._clock = clock
        self._random = random
        self._budget = RestartBudget(max_restarts, WINDOW_S)
        self._deaths: list[float] = []
        self._last = Obituary()
        self._num_cores = 0
        self._next_start: float | None = clock()
        self._link = Link(b"supervisor/0")
        self._watchdog = Watchdog(PATIENCE)
        self._next_beat = 0.0
        self.progress = Progress()

    @property
    def routing_id(self) -> bytes:
        """Of its own connection to the core that there is."""
        return self._link.routing_id

    def start_if_due(self) -> None:
        """Start a core, if it is time; some do not even get ready."""
        now = self._clock()
        if self._next_start is None or now < self._next_start:
            return
        self._next_start = None
        if self._random.random() < 0.05:
            self.happened["failed start"] += 1
            self._replace(had_served=False)
            return
        self._num_cores += 1
        self.host = CoreHost(self._setting, self._num_cores, self._clock, self._random, self._last)
        self._link = Link(b"supervisor/%d" % self._num_cores)
        self._link.say(Hello(PROTOCOL_VERSION, ""), now)
        self.host.hear(self._link)
        self._watchdog = Watchdog(PATIENCE)
        self.progress = Progress()

    def kill(self, why: str, *, has_crashed: bool = False) -> None:
        """The core is gone, wherever it was."""
        assert self.host is not None
        self.happened[why] += 1
        self.happened["crash without a reason"] += has_crashed and not self.host.is_poisoned
        self._last = self.host.die(self._random, has_crashed=has_crashed)
        self.host = None
        self._replace(had_served=True)

    def _replace(self, *, had_served: bool) -> None:
        now = self._clock()
        delay_s = self._budget.spend(now, had_served=had_served)
        recent = sum(now - death <= WINDOW_S for death in self._deaths)
        if delay_s is None:
            assert recent == self.max_restarts, "given up too early"
            self.is_spent = True
            return
        assert recent < self.max_restarts, "more restarts than allowed"
        assert (delay_s == 0.0) == had_served
        self._deaths.append(now)
        self._next_start = now + delay_s + self._random.random() * 0.2

    # ---- the watchdog

    def beat_if_due(self) -> None:
        """Look at the core's pulse, if it is time."""
        now = self._clock()
        if now < self._next_beat:
            return
        self._next_beat = now + PATIENCE.beat_s
        host, link = self.host, self._link
        if host is None:
            return
        while link.answers:
            message = decode_of_core(link.answers.popleft())
            if isinstance(message, Pong):
                self._watchdog.hear(message)
        verdict = self._watchdog.tick(now)
        self.progress.check(verdict, now)
        if verdict is Verdict.STALLED:
            self.happened["stalled"] += 1
        if verdict is Verdict.HUNG:
            self.kill("hung", has_crashed=True)
            return
        link.say(Ping(1), now)
        if not host.is_stopped:
            while link.to_core:
                host.hear(link)
            self.progress.show()


class Progress:
    """What is true of a core that a watchdog looks at: whether it makes progress, and since when it
    cannot have shown any."""

    def __init__(self) -> None:
        self._since: float | None = None  # it is stuck
        self._unshown_since: float | None = None  # it has been stuck, and not been asked meanwhile
        self._known_s = 0.0  # for how long that was at the beat before
        self._least_slept_s = self._most_slept_s = 0.0
        self._least_slept_since_s = 0.0  # since it is stuck

    def stop(self, now: float) -> None:
        """From now on it is stuck."""
        self._since, self._least_slept_since_s = now, 0.0
        if self._unshown_since is None:
            self._unshown_since = now
            self._least_slept_s = self._most_slept_s = 0.0

    def go_on(self) -> None:
        """It is stuck no longer."""
        self._since = None

    def show(self) -> None:
        """It was asked, and has answered: also in a step, which its answer gives the number of."""
        if self._unshown_since != self._since:
            self._unshown_since = self._since
            self._least_slept_s = self._least_slept_since_s

    def sleep(self, seconds: float) -> None:
        """So much time has passed in which nothing ran, the core and its watchdog included. Two
        beats of it may count: so long it may be from one to the next."""
        self._most_slept_s += seconds
        self._least_slept_s += seconds - 2 * PATIENCE.beat_s
        self._least_slept_since_s += seconds - 2 * PATIENCE.beat_s

    def check(self, verdict: Verdict, now: float) -> None:
        """The watchdog says so now. What it knows is one beat old."""
        stuck_s = 0.0 if self._unshown_since is None else now - self._unshown_since
        known_s = max(self._known_s, stuck_s - self._least_slept_s)
        self._known_s = stuck_s - self._least_slept_s if stuck_s else 0.0
        if verdict is Verdict.HUNG:
            assert known_s >= PATIENCE.hung_s - SLACK_S, "killed too early"
        elif verdict is Verdict.SILENT:
            assert known_s > 0.0, "a false alarm"
        elif verdict is Verdict.STALLED:
            assert known_s >= PATIENCE.stalled_s - SLACK_S, "a false alarm"
        if self._since is not None and verdict is not Verdict.HUNG:
            awake_s = now - self._since - self._most_slept_s
            assert awake_s <= PATIENCE.hung_s + PATIENCE.silent_s + SLACK_S, "a hang goes on"
