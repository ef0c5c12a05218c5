"""Waking a core that sleeps in its inbox."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from footplate.backend.inbox import MAX_BATCHES, Inbox
from footplate.backend.pulse import Pulse

PATIENCE_S = 30.0


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = Inbox(context, f"ipc://{tmp_path}/x", Pulse())
    yield inbox
    inbox.close()
    context.destroy(linger=0)


def test_a_take_that_waits_returns_when_another_thread_wakes_it(inbox: Inbox) -> None:
    waker = threading.Thread(target=inbox.wake)
    waker.start()
    assert inbox.take(None) == []  # for ever, if nobody woke it
    waker.join()


def test_a_wake_before_the_take_is_not_lost_and_counts_once(inbox: Inbox) -> None:
    inbox.wake()
    inbox.wake()
    assert inbox.take(None) == []
    assert inbox.take(0) == []


def test_waking_never_waits_for_room(inbox: Inbox) -> None:
    for _ in range(3 * MAX_BATCHES):
        inbox.wake()
    assert inbox.take(PATIENCE_S) == []
