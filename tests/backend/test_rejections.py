"""Counting those who were not let in, from beginnings and ends of connections."""

import random

import pytest
import zmq

from footplate.backend.rejections import Rejections

ACCEPTED, SUCCEEDED = zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED
ENDED = zmq.EVENT_DISCONNECTED


def test_a_connection_that_ends_without_a_handshake_counts_and_another_does_not() -> None:
    rejections = Rejections()
    for _ in range(3):  # file descriptors come again
        assert not rejections.on_event(ACCEPTED, 5)
        assert not rejections.on_event(SUCCEEDED, 0)
        assert not rejections.on_event(ENDED, 5)
        assert not rejections.on_event(ACCEPTED, 5)
        assert rejections.on_event(ENDED, 5)
    assert rejections.num == 3


def test_somebody_who_does_not_speak_does_not_hide_the_others() -> None:
    rejections = Rejections()
    rejections.on_event(ACCEPTED, 1)  # and says nothing
    rejections.on_event(ACCEPTED, 2)
    rejections.on_event(SUCCEEDED, 0)
    for _ in range(10):
        rejections.on_event(ACCEPTED, 3)
        rejections.on_event(ENDED, 3)
    rejections.on_event(ENDED, 2)
    rejections.on_event(ENDED, 1)
    assert rejections.num == 11


@pytest.mark.parametrize("seed", range(200))
def test_the_sum_is_right_in_whatever_order_connections_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    rejections = Rejections()
    waiting: list[int] = []
    inside: list[int] = []
    num_rejected, last = 0, 0
    for _ in range(rng.randrange(200)):
        match rng.randrange(4):
            case 0:
                free = min(set(range(500)) - set(waiting) - set(inside))
                waiting.append(free)
                rejections.on_event(ACCEPTED, free)
            case 1 if waiting:
                inside.append(waiting.pop(rng.randrange(len(waiting))))
                rejections.on_event(SUCCEEDED, 0)
            case 2 if waiting:
                rejections.on_event(ENDED, waiting.pop(rng.randrange(len(waiting))))
                num_rejected += 1
            case 3 if inside:
                rejections.on_event(ENDED, inside.pop(rng.randrange(len(inside))))
        assert last <= rejections.num  # a counter only grows
        last = rejections.num
    for descriptor in inside:
        rejections.on_event(ENDED, descriptor)
    for descriptor in waiting:
        rejections.on_event(ENDED, descriptor)
    assert rejections.num == num_rejected + len(waiting)
