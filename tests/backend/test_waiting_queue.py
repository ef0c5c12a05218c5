"""Who is next: within a client by rank, between clients by what they have been served."""

from itertools import count

import pytest

from footplate.backend.request import Event, Request, State
from footplate.backend.waiting_queue import WaitingQueue
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 16, 0, ())


class Bench:
    """A queue, and requests in the order in which they come."""

    def __init__(self, by_priority: bool = False) -> None:
        self.queue = WaitingQueue(by_priority)
        self._arrivals = count()

    def push(
        self, client: bytes = b"a", *, priority: int = 0, arrival_time: float = 0.0
    ) -> Request:
        arrival = next(self._arrivals)
        request = Request(arrival, client, arrival, [1], 1, PARAMS, priority)
        request.arrival, request.arrival_time = arrival, arrival_time
        request.state = State.WAITING
        self.queue.push(request)
        self.queue.check_ledger()
        return request

    def pop(self, tokens: int = 0) -> Request:
        """The next one, and what its client is served for it."""
        request = self.queue.pop()
        self.queue.serve(request.client, tokens)
        self.queue.check_ledger()
        return request

    def order(self, tokens: int = 10) -> bytes:
        return b"".join(self.pop(tokens).client for _ in range(len(self.queue)))


@pytest.mark.parametrize("by_priority", [False, True])
def test_one_client_is_served_in_the_order_of_arrival(by_priority: bool) -> None:
    bench = Bench(by_priority)
    requests = [bench.push() for _ in range(20)]
    assert [bench.pop(tokens=100) for _ in range(20)] == requests
    assert bench.queue.peek() is None


def test_a_request_that_has_come_a_long_way_has_its_old_place() -> None:
    bench = Bench()
    first, replayed = bench.push(arrival_time=5.0), bench.push(arrival_time=3.0)
    assert [bench.pop(), bench.pop()] == [replayed, first]


def test_priorities_count_only_under_the_priority_policy() -> None:
    for by_priority in (False, True):
        bench = Bench(by_priority)
        late, soon = bench.push(priority=1), bench.push(priority=0)
        assert bench.pop() is (soon if by_priority else late)


def test_a_flood_of_one_client_does_not_drown_another() -> None:
    bench = Bench()
    for _ in range(6):
        bench.push(b"a")
    bench.push(b"b"), bench.push(b"b")
    assert bench.order() == b"ababaaaa"


def test_it_is_tokens_that_count_and_not_requests() -> None:
    bench = Bench()
    for _ in range(4):
        bench.push(b"a"), bench.push(b"b")
    served = b""
    while len(bench.queue):
        client = bench.queue.peek().client  # type: ignore[union-attr]
        served += bench.pop(tokens=30 if client == b"a" else 10).client
    assert served == b"abbbabaa"


def test_running_requests_are_served_too() -> None:
    bench = Bench()
    for client in (b"a", b"b", b"a", b"b"):
        bench.push(client)
    bench.queue.serve(b"a", 5)
    assert bench.order() == b"baba"


def test_who_comes_back_from_idleness_has_saved_up_nothing() -> None:
    bench = Bench()
    bench.push(b"b")
    assert bench.order(tokens=1) == b"b"
    bench.push(b"a")
    for _ in range(20):
        bench.push(b"a")
        bench.pop(tokens=100)
    for _ in range(3):
        bench.push(b"a"), bench.push(b"b")
    assert bench.order() == b"abababa"


def test_who_comes_when_nobody_waits_is_lifted_to_the_last_that_did() -> None:
    bench = Bench()
    bench.push(b"b")
    bench.push(b"a")
    assert bench.order(tokens=100) == b"ba"
    bench.queue.serve(b"a", 300)  # while it runs
    for client in (b"c", b"a", b"a", b"c", b"c"):
        bench.push(client)
    assert bench.order(tokens=200) == b"caacc"


def test_who_was_served_much_stays_behind_when_it_was_idle_for_a_moment() -> None:
    bench = Bench()
    bench.push(b"a"), bench.push(b"b"), bench.push(b"b"), bench.push(b"b")
    assert bench.pop(tokens=25).client == b"a"
    bench.push(b"a")  # it has nothing else: its counter is not forgotten
    assert bench.order() == b"bbba"


def test_a_better_priority_goes_first_whatever_its_client_was_served() -> None:
    bench = Bench(by_priority=True)
    bench.push(b"a", priority=1), bench.push(b"b", priority=1)
    bench.queue.serve(b"b", 1000)
    urgent = bench.push(b"b", priority=0)
    assert bench.pop() is urgent
    assert bench.pop().client == b"a"


def test_every_client_is_served_in_bounded_time() -> None:
    bench = Bench()
    bench.push(b"a")
    patient = bench.push(b"z")
    bench.queue.serve(b"z", 1000)
    for turn in range(1000):
        bench.push(b"a")
        if bench.pop(tokens=10) is patient:
            assert turn == 100
            return
    raise AssertionError("it starves")


def test_finished_requests_are_passed_over() -> None:
    bench = Bench()
    gone, next_one = bench.push(b"a"), bench.push(b"a")
    gone.advance(Event.FINISH)
    bench.queue.discard(gone)
    bench.queue.check_ledger()
    assert len(bench.queue) == 1 and list(bench.queue) == [next_one]
    assert bench.pop() is next_one


def test_a_client_whose_requests_have_all_ended_is_not_waited_for() -> None:
    bench = Bench()
    gone, other = bench.push(b"a"), bench.push(b"b")
    gone.advance(Event.FINISH)
    bench.queue.discard(gone)
    assert bench.pop() is other
    bench.queue.forget(b"a")
    bench.queue.forget(b"never seen")
    assert not bench.queue.is_shared


def test_a_client_that_still_waits_cannot_be_forgotten() -> None:
    bench = Bench()
    bench.push(b"a")
    with pytest.raises(AssertionError):
        bench.queue.forget(b"a")
