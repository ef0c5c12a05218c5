"""Which pulse is that of a core that works."""

import pytest

from footplate.frontend.watchdog import Patience, Verdict, Watchdog
from footplate.protocol.messages import Pong

PATIENCE = Patience(beat_s=0.25, silent_s=1.0, stalled_s=5.0, hung_s=60.0)


class Observed:
    """A core and its watchdog, in steps of a beat."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(PATIENCE)
        self.now = 1000.0
        self.num_steps = 0
        self.is_busy = False
        self.answers = True

    def beat(self, seconds: float = PATIENCE.beat_s) -> Verdict:
        """Time passes, and a ping is sent and answered."""
        self.now += seconds
        verdict = self.watchdog.tick(self.now)
        if self.answers:
            self.watchdog.hear(Pong(0, 9, self.num_steps, self.is_busy, 0.0))
        return verdict

    def watch(self, seconds: float) -> list[Verdict]:
        return [self.beat() for _ in range(round(seconds / PATIENCE.beat_s))]

    def until(self, verdict: Verdict, most_s: float = 200.0) -> float:
        """How long it takes until this is said, in seconds."""
        start = self.now
        while self.beat() is not verdict:
            assert self.now - start < most_s, f"{verdict} is never said"
        return self.now - start


def test_an_idle_core_that_answers_is_well_for_ever() -> None:
    core = Observed()
    assert set(core.watch(300.0)) == {Verdict.WELL}
    assert core.watchdog.last_step_age_s == 0.0


def test_a_core_whose_steps_take_four_seconds_is_well() -> None:
    core = Observed()
    core.is_busy = True
    for _ in range(150):  # ten minutes
        core.num_steps += 1
        assert set(core.watch(4.0)) == {Verdict.WELL}


def test_a_core_in_one_step_is_stalled_once_and_hung_in_the_end() -> None:
    core = Observed()
    core.is_busy = True
    core.beat()
    verdicts = core.watch(70.0)
    assert verdicts.index(Verdict.STALLED) * PATIENCE.beat_s == pytest.approx(5.0, abs=0.5)
    assert verdicts.index(Verdict.HUNG) * PATIENCE.beat_s == pytest.approx(60.0, abs=0.5)
    assert verdicts.count(Verdict.STALLED) == 1
    assert Verdict.SILENT not in verdicts


def test_the_next_step_that_stalls_is_told_of_again() -> None:
    core = Observed()
    core.is_busy = True
    core.until(Verdict.STALLED)
    core.num_steps += 1
    assert core.until(Verdict.STALLED) > PATIENCE.stalled_s
    assert core.watchdog.last_step_age_s > PATIENCE.stalled_s


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_core_that_does_not_answer_is_silent_and_hung_in_the_end(is_busy: bool) -> None:
    core = Observed()
    core.is_busy = is_busy
    core.watch(2.0)
    core.answers = False
    assert core.until(Verdict.SILENT) <= PATIENCE.silent_s + 2 * PATIENCE.beat_s
    assert core.watchdog.is_silent
    rest = core.until(Verdict.HUNG)
    assert PATIENCE.hung_s - 5.0 < rest < PATIENCE.hung_s + 5.0


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_core_that_was_stopped_and_goes_on_is_well_again(is_busy: bool) -> None:
    core = Observed()
    core.is_busy = is_busy
    core.answers = False
    core.watch(30.0)
    core.answers = True
    core.num_steps += 1
    core.beat()
    assert core.beat() is Verdict.WELL
    assert not core.watchdog.is_silent and core.watchdog.last_step_age_s <= PATIENCE.beat_s


def test_a_core_that_was_stopped_in_a_step_is_still_in_it() -> None:
    core = Observed()
    core.is_busy = True
    core.beat()
    core.answers = False
    core.watch(30.0)
    core.answers = True
    core.beat()
    assert not core.watchdog.is_silent
    assert core.watchdog.last_step_age_s == pytest.approx(30.0, abs=1.0)


def test_a_core_is_not_silent_because_the_machine_was_suspended() -> None:
    core = Observed()
    core.is_busy = True
    core.watch(1.0)
    assert core.beat(3600.0) is Verdict.WELL
    core.answers = False
    assert core.beat(3600.0) is Verdict.WELL, "one long tick is no more than two beats"


def test_silence_begins_with_the_first_ping_that_is_missed_after_a_rest() -> None:
    core = Observed()
    core.is_busy, core.answers = True, False
    core.watch(50.0)
    core.watchdog.rest()
    assert not core.watchdog.is_silent and core.watchdog.last_step_age_s == 0.0
    assert core.beat(100.0) is Verdict.WELL
    assert core.until(Verdict.SILENT) <= PATIENCE.silent_s + 2 * PATIENCE.beat_s


def test_what_was_known_before_a_rest_is_known_no_longer() -> None:
    core = Observed()
    core.is_busy = True
    core.until(Verdict.STALLED)
    core.watchdog.rest()
    core.beat()
    core.answers = False
    core.until(Verdict.STALLED)  # told anew
    idle = Observed()
    idle.is_busy = True
    idle.beat()
    idle.watchdog.rest()
    idle.answers = False
    idle.watch(0.75)
    assert idle.watchdog.last_step_age_s == 0.0, "perhaps it is idle now"
