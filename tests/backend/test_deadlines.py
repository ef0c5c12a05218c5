"""Whose time is up, and when the next one's is."""

from footplate.backend.deadlines import Deadlines
from footplate.backend.request import Request, State
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 16, 0, ())


def request(key: int, arrival_time: float = 100.0) -> Request:
    return Request(key, b"client", key, [1], 1, PARAMS, arrival_time=arrival_time)


def test_a_deadline_counts_from_the_arrival() -> None:
    deadlines = Deadlines()
    early, late = request(1, arrival_time=90.0), request(2)
    deadlines.add(late, None, 10.0)
    deadlines.add(early, None, 10.0)
    assert deadlines.next_due == 100.0
    assert deadlines.take_overdue(99.9) == []
    assert deadlines.take_overdue(100.0) == [early]
    assert deadlines.next_due == 110.0
    assert deadlines.take_overdue(1000.0) == [late]
    assert deadlines.next_due is None


def test_without_deadlines_nothing_is_due() -> None:
    deadlines = Deadlines()
    deadlines.add(request(1), None, None)
    assert deadlines.next_due is None
    assert deadlines.take_overdue(1e9) == []


def test_the_first_token_ends_the_first_tokens_deadline_and_no_other() -> None:
    deadlines = Deadlines()
    served, waiting = request(1), request(2)
    deadlines.add(served, 5.0, 50.0)
    deadlines.add(waiting, 5.0, 50.0)
    served.token_ids = [1, 8]
    assert deadlines.take_overdue(105.0) == [waiting]
    waiting.state = State.FINISHED
    assert deadlines.next_due == 150.0
    assert deadlines.take_overdue(150.0) == [served]


def test_who_misses_both_deadlines_at_once_is_told_of_once() -> None:
    deadlines = Deadlines()
    deadlines.add(one := request(1), 1.0, 2.0)
    assert deadlines.take_overdue(103.0) == [one]
    assert deadlines.take_overdue(103.0) == []


def test_a_finished_request_is_never_overdue_and_wakes_nobody() -> None:
    deadlines = Deadlines()
    deadlines.add(ended := request(1), None, 1.0)
    deadlines.add(request(2), None, 7.0)
    ended.state = State.FINISHED
    assert deadlines.next_due == 107.0


def test_deadlines_of_finished_requests_do_not_pile_up() -> None:
    deadlines = Deadlines()
    live = [request(key) for key in range(10)]
    for one in live:
        deadlines.add(one, None, 3600.0)
    for key in range(10, 10_000):
        deadlines.add(ended := request(key), 60.0, 3600.0)
        ended.state = State.FINISHED
        assert len(deadlines._heap) < 100
    assert sorted(r.key for r in deadlines.take_overdue(4000.0)) == list(range(10))
