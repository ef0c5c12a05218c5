"""How much of one client's requests may wait, and what a refusal says."""

import pytest

from footplate.frontend.admission import DEFAULT_RETRY_S, MAX_RETRY_S, WaitingRequests
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import InvalidRequestError, QueueOverflowError

LIMITS = RequestConfig(max_num_queued_reqs=3, max_num_queued_tokens=100)


def retry_s(waiting: WaitingRequests, num_reqs: int, num_tokens: int = 0) -> float:
    with pytest.raises(QueueOverflowError) as caught:
        waiting.require_room(LIMITS, num_reqs, num_tokens)
    return caught.value.retry_after_s


def test_without_limits_there_is_always_room() -> None:
    waiting = WaitingRequests()
    waiting.enter(10**6, 10**9)
    waiting.require_room(RequestConfig(max_num_queued_reqs=None), 10**6, 10**9)


def test_there_is_room_up_to_the_limit_and_none_beyond() -> None:
    waiting = WaitingRequests()
    waiting.enter(2, 90)
    waiting.require_room(LIMITS, 1, 10)
    with pytest.raises(
        QueueOverflowError, match=r"2 requests wait, 2 more .*max_num_queued_reqs=3"
    ):
        waiting.require_room(LIMITS, 2, 10)
    with pytest.raises(QueueOverflowError, match=r"90 tokens wait, 11 more .*queued_tokens=100"):
        waiting.require_room(LIMITS, 1, 11)


def test_what_would_not_fit_if_nobody_waited_is_not_told_to_come_back() -> None:
    waiting = WaitingRequests()
    waiting.require_room(LIMITS, 3, 100)
    with pytest.raises(InvalidRequestError, match=r"4 requests can never .*_reqs=3"):
        waiting.require_room(LIMITS, 4, 100)
    with pytest.raises(InvalidRequestError, match=r"101 prompt tokens can never .*_tokens=100"):
        waiting.require_room(LIMITS, 3, 101)


def test_who_has_started_or_left_waits_no_longer() -> None:
    waiting = WaitingRequests()
    waiting.enter(3, 100)
    waiting.start(40, now=1.0)
    waiting.leave(1, 30)
    assert (waiting.num_reqs, waiting.num_tokens) == (1, 30)
    waiting.require_room(LIMITS, 2, 70)


def test_a_refusal_says_when_to_come_back_by_the_rate_of_the_last_starts() -> None:
    waiting = WaitingRequests()
    waiting.enter(9, 110)
    assert retry_s(waiting, 1) == DEFAULT_RETRY_S, "nothing is known yet"
    for second in range(6):  # one request of ten tokens every two seconds
        waiting.start(10, now=2.0 * second)
    assert retry_s(waiting, 2) == 2 * 2.0, "three wait, two more: two have to start"
    waiting.leave(1, 0)
    assert retry_s(waiting, 1, 70) == 2 * 2.0, "fifty tokens wait: two times ten too many"


def test_no_estimate_is_beyond_all_patience() -> None:
    waiting = WaitingRequests()
    waiting.enter(5, 0)
    for now in (0.0, 1e6):
        waiting.start(0, now)
    assert retry_s(waiting, 1) == MAX_RETRY_S
