"""An engine that is about to end: nothing new, what there is comes to its end, then it says so."""

from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import cast

import pytest

from footplate.backend.core_process import BACKLOG_RETRY_S, _patience
from footplate.backend.outbox import Outbox
from footplate.protocol.messages import ControlReply, ErrorKind, Finished, FinishReason

from .flow_driver import ALICE, BOB, FlowDriver, expected

LENGTH, ABORT, ERROR = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
REFUSAL = "the engine is about to end and takes no new requests"


@pytest.fixture
def driver(tmp_path: Path) -> FlowDriver:
    return FlowDriver(tmp_path, max_num_seqs=2)


def test_who_runs_and_who_waits_finishes_and_then_it_is_answered(driver: FlowDriver) -> None:
    for handle in range(4):
        driver.add(ALICE, handle, [handle + 1])
    driver.step()
    assert driver.drain(BOB, 7) is None
    assert driver.core.is_draining
    while not driver.replies:
        assert driver.core.has_work or driver.core.is_drained
        driver.step()
    assert not driver.core.is_drained
    assert driver.replies == [(BOB, ControlReply(7, True))]
    for handle in range(4):
        assert driver.tokens(ALICE, handle) == expected([handle + 1], 3)
        assert driver.ends(ALICE, handle) == [Finished(handle, LENGTH)], "told before the reply"
    driver.check_empty()


def test_an_idle_engine_is_drained_at_once(driver: FlowDriver) -> None:
    driver.drain(ALICE, 1)
    assert driver.core.is_drained
    driver.step()
    assert driver.replies == [(ALICE, ControlReply(1, True))]
    driver.check_empty()
    driver.drain(ALICE, 2, timeout_s=5.0)
    driver.step()
    assert driver.replies[1:] == [(ALICE, ControlReply(2, True))]
    assert driver.core.seconds_to_deadline is None, "there is nothing to wait for"


def test_what_clients_have_still_to_take_is_waited_for_until_the_deadline(
    driver: FlowDriver,
) -> None:
    driver.drain(ALICE, 1, timeout_s=5.0)
    assert driver.core.take_replies(has_backlog=True) == []
    assert driver.core.is_drained and not driver.core.has_work
    assert driver.core.seconds_to_deadline == 5.0
    driver.clock.now += 5.0
    assert driver.core.take_replies(has_backlog=True) == [(ALICE, ControlReply(1, True))]
    assert driver.core.seconds_to_deadline is None
    driver.drain(ALICE, 2)
    assert driver.core.take_replies(has_backlog=False) == [(ALICE, ControlReply(2, True))]


@dataclass
class Lanes:
    """An outbox, as the busy loop asks it how long to wait."""

    has_backlog: bool


def test_the_busy_loop_does_not_spin_while_a_client_has_still_to_read(driver: FlowDriver) -> None:
    lanes = Lanes(has_backlog=True)
    outbox = cast(Outbox, lanes)
    driver.drain(ALICE, 1)
    for _ in range(3):
        assert driver.core.take_replies(lanes.has_backlog) == []
        assert _patience(driver.core, outbox) == BACKLOG_RETRY_S
    driver.drain(BOB, 2, timeout_s=BACKLOG_RETRY_S / 2)
    assert _patience(driver.core, outbox) == pytest.approx(BACKLOG_RETRY_S / 2)
    lanes.has_backlog = False  # it has been flushed behind the last look
    assert _patience(driver.core, outbox) == 0
    assert len(driver.core.take_replies(lanes.has_backlog)) == 2
    assert _patience(driver.core, outbox) is None


def test_every_clients_new_requests_are_refused_and_replays_are_not(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1])
    driver.drain(ALICE, 1)
    driver.add(ALICE, 2, [2])
    driver.add(BOB, 1, [2], n=2)
    driver.add(BOB, 5, [3], is_replay=True)
    driver.run()
    refused = Finished(2, ERROR, REFUSAL, ErrorKind.DRAINING)
    assert driver.ends(ALICE, 2) == driver.ends(BOB, 2) == [refused]
    assert len(driver.ends(BOB, 1)) == 1
    assert driver.tokens(BOB, 5) == expected([3], 3)
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]


def test_at_the_deadline_what_is_left_ends_with_abort(driver: FlowDriver) -> None:
    for handle in range(1, 5):  # two run, one waits, one is parked
        driver.add(ALICE, handle, [handle], max_tokens=30)
    driver.step()
    driver.park(ALICE, 4)
    driver.drain(ALICE, 1, timeout_s=5.0)
    driver.step()
    assert driver.core.seconds_to_deadline == 5.0
    driver.clock.now += 4.9
    driver.step()
    assert not driver.replies
    driver.clock.now += 0.2
    driver.step()
    driver.step()
    for handle in range(1, 5):
        assert driver.ends(ALICE, handle) == [Finished(handle, ABORT)]
    assert driver.tokens(ALICE, 1) == expected([1], 3)
    assert driver.replies == [(ALICE, ControlReply(1, True))]
    driver.check_empty()


def test_an_engine_whose_only_requests_are_parked_wakes_at_the_deadline(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.step()
    driver.park(ALICE, 1)
    driver.drain(ALICE, 1, timeout_s=5.0)
    driver.step()
    assert not driver.core.has_work
    assert driver.core.seconds_to_deadline == 5.0
    driver.clock.now += 5
    driver.step()
    driver.run()
    assert driver.replies == [(ALICE, ControlReply(1, True))]


@pytest.mark.parametrize(("second", "due"), [(2.0, 2.0), (9.0, 5.0), (None, 5.0), (inf, 5.0)])
def test_another_drain_may_shorten_the_deadline_and_both_are_answered(
    driver: FlowDriver, second: float | None, due: float
) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.drain(ALICE, 1, timeout_s=5.0)
    driver.drain(BOB, 8, timeout_s=second)
    assert driver.core.seconds_to_deadline == due
    driver.clock.now += due
    driver.run()
    assert driver.replies == [(ALICE, ControlReply(1, True)), (BOB, ControlReply(8, True))]
    assert driver.ends(ALICE, 1) == [Finished(1, ABORT)]


def test_no_time_at_all_ends_everything_at_the_next_step(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.step()
    driver.drain(ALICE, 1, timeout_s=0.0)
    driver.run()
    assert len(driver.tokens(ALICE, 1)) == 1
    assert driver.replies == [(ALICE, ControlReply(1, True))]
    driver.check_empty()


def test_a_client_that_leaves_lets_the_others_drain(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.add(BOB, 1, [1])
    driver.drain(ALICE, 1)
    driver.step()
    driver.core.leave(ALICE)
    driver.run()
    assert driver.ends(BOB, 1) == [Finished(1, LENGTH)]
    driver.core.join(ALICE)
    driver.add(ALICE, 1, [1])
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ERROR, REFUSAL, ErrorKind.DRAINING)]


@pytest.mark.parametrize("seconds", [nan, -1.0, -inf])
def test_a_timeout_that_makes_no_sense_is_refused_and_drains_nothing(
    driver: FlowDriver, seconds: float
) -> None:
    reply = driver.drain(ALICE, 3, timeout_s=seconds)
    assert reply == ControlReply(3, False, f"timeout_s is {seconds}, must be at least 0")
    assert not driver.core.is_draining
    driver.add(ALICE, 1, [1])
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]
