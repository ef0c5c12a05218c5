"""What a client does not read costs its budget, and last words reach those who do."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import zmq

from footplate.backend import outbox as outbox_module
from footplate.backend.outbox import Outbox

CLIENT = b"client"
BUDGET = 1000


class Link:
    """An outbox with one client, whose sockets hold next to nothing."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pull = self._context.socket(zmq.PULL)
        self.pull.set(zmq.RCVHWM, 1)
        self.pull.bind("inproc://outputs")
        self._push = push = self._context.socket(zmq.PUSH)
        push.set(zmq.SNDHWM, 1)
        push.set(zmq.LINGER, 0)
        push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        push.connect("inproc://outputs")
        self.outbox = Outbox(BUDGET)
        self.outbox.join(CLIENT, push)

    def fill(self) -> int:
        """Numbers, from 0 on, until some wait in the outbox; how many."""
        number = 0
        while not self.outbox.has_backlog:
            assert self.outbox.send(CLIENT, b"%d" % number)
            number += 1
        return number

    def read_one(self) -> bytes:
        """One frame, whose place is free then."""
        frame = self.pull.recv()
        assert self._push.poll(5000, zmq.POLLOUT)
        return frame

    def read_until(self, last: bytes) -> list[bytes]:
        frames: list[bytes] = []
        while frames[-1:] != [last]:
            assert self.pull.poll(5000), frames
            frames.append(self.pull.recv())
        return frames

    def close(self) -> None:
        self.outbox.close()
        self._context.destroy(linger=0)


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


def test_what_the_socket_does_not_take_is_kept_in_order(link: Link) -> None:
    count = link.fill()
    for number in range(count, 20):
        assert link.outbox.send(CLIENT, b"%d" % number)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.extend(link.read_until(b"19")))
    reader.start()
    while reader.is_alive():
        link.outbox.flush()
        reader.join(0.001)
    assert read == [b"%d" % number for number in range(20)]
    assert not link.outbox.has_backlog


def test_a_client_that_does_not_read_has_a_budget_in_bytes(link: Link) -> None:
    link.fill()
    backlog = 1  # byte: the last number
    while backlog + 100 <= BUDGET:
        assert link.outbox.send(CLIENT, bytes(100))
        backlog += 100
    assert not link.outbox.send(CLIENT, bytes(100))
    assert link.outbox.send(CLIENT, bytes(BUDGET - backlog)), "what fits is taken"


def test_who_has_left_is_told_nothing_which_is_no_error(link: Link) -> None:
    link.fill()
    link.outbox.leave(CLIENT)
    link.outbox.leave(CLIENT)
    assert not link.outbox.has_backlog
    assert link.outbox.send(CLIENT, bytes(2 * BUDGET))


def test_last_words_reach_a_slow_reader_behind_all_that_was_said(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "LAST_WORDS_S", 5.0)
    link.fill()
    link.outbox.send(CLIENT, b"more")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.extend(link.read_until(b"last")))
    reader.start()
    link.outbox.broadcast(b"last", b"last")
    reader.join(5)
    assert read[-2:] == [b"more", b"last"]


def test_last_words_wait_for_nobody_for_long(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "LAST_WORDS_S", 0.02)
    link.fill()
    link.outbox.broadcast(b"last", b"last")
    assert link.outbox.has_backlog


@dataclass
class Clock:
    """Time passes while somebody waits, and then `meanwhile` happens."""

    meanwhile: Callable[[], object]
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 0.9
        self.meanwhile()


def test_last_words_wait_for_a_reader_who_is_far_behind_as_long_as_it_reads(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(meanwhile=link.read_one)
    monkeypatch.setattr(outbox_module, "time", clock)
    for number in range(link.fill(), 10):
        link.outbox.send(CLIENT, b"%d" % number)
    link.outbox.broadcast(b"last", b"last", patience_s=1.0)
    assert not link.outbox.has_backlog
    assert clock.now > 4.0


def test_last_words_wait_for_nobody_without_end(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(meanwhile=lambda: link.outbox.send(CLIENT, b"x") and link.read_one())
    monkeypatch.setattr(outbox_module, "time", clock)
    link.fill()
    link.outbox.broadcast(b"last", b"last", patience_s=1.0)
    assert clock.now < outbox_module.MOST_LAST_WORDS_S + 1.0
