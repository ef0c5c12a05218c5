"""What a Welcome tells each client of the core before this one, and taking leave."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from footplate.backend.flight_recorder import digest_session
from footplate.backend.inbox import Inbox, Joined, Left, close_monitored
from footplate.backend.pulse import Pulse
from footplate.protocol.codec import Encoder, core_message_decoder
from footplate.protocol.links import new_client_id, output_endpoint
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    Hello,
    Limits,
    ModelFacts,
    Progress,
    Refused,
    Welcome,
)

PATIENCE_S = 30.0
WELCOME = Welcome(
    epoch=1,
    version=PROTOCOL_VERSION,
    model=ModelFacts("m", "t", "A", 10, 20, (), "", "", ""),
    limits=Limits(1, 1, "fcfs", 1, 1, True),
    process_id=1,
    phases={},
)
ALICE, BOB = b"A" * 16, b"B" * 16

Greet = Callable[[bytes], Callable[[], Welcome | Progress | Refused]]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def inbox(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Inbox]:
    suspects = {digest_session(ALICE): [3, 5], digest_session(b""): [9]}
    inbox = Inbox(context, f"ipc://{tmp_path}/x", Pulse(), suspects)
    yield inbox
    inbox.close()


def join(inbox: Inbox) -> Joined:
    """Who has joined, when the inbox is done."""
    [(_, joined)] = inbox.take(PATIENCE_S)
    assert isinstance(joined, Joined)
    inbox.close()
    close_monitored(joined.push, linger=0)
    return joined


@pytest.fixture
def greet(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Greet]:
    """Say Hello as a session; each call of what comes back is the next answer."""
    address = f"ipc://{tmp_path}/x"
    sockets: list[zmq.Socket[bytes]] = []

    def say_hello(session: bytes) -> Callable[[], Welcome | Progress | Refused]:
        client_id = new_client_id()
        endpoint = output_endpoint(address, client_id)
        pull, dealer = context.socket(zmq.PULL), context.socket(zmq.DEALER)
        sockets.extend((pull, dealer))
        pull.bind(endpoint)
        dealer.set(zmq.ROUTING_ID, client_id)
        dealer.set(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        dealer.connect(address)
        hello = Encoder().encode(Hello(PROTOCOL_VERSION, endpoint, session))
        dealer.send_multipart([hello, hello])  # a client may ask again before it is answered

        def hear() -> Welcome | Progress | Refused:
            answer = core_message_decoder().decode(dealer.recv())
            assert isinstance(answer, Welcome | Progress | Refused)
            return answer

        return hear

    yield say_hello
    for socket in sockets:
        socket.close(linger=0)


@pytest.mark.parametrize(
    ("session", "suspects"), [(ALICE, [3, 5]), (BOB, []), (b"", [])], ids=["alice", "bob", "none"]
)
def test_a_session_is_told_its_own_suspects_as_often_as_it_asks(
    inbox: Inbox, greet: Greet, session: bytes, suspects: list[int]
) -> None:
    inbox.announce(WELCOME)
    hear = greet(session)
    for _ in range(2):
        welcome = hear()
        assert isinstance(welcome, Welcome)
        assert (welcome.suspects, welcome.epoch) == (suspects, 1)
    assert join(inbox).session == session


def test_one_that_came_while_the_core_was_starting_is_told_too(inbox: Inbox, greet: Greet) -> None:
    hear = greet(ALICE)
    assert isinstance(hear(), Progress) and isinstance(hear(), Progress)
    inbox.announce(WELCOME)
    welcome = hear()
    assert isinstance(welcome, Welcome) and welcome.suspects == [3, 5]
    join(inbox)


def test_who_waits_is_told_what_is_announced_last_although_the_inbox_is_busy_when_it_ends(
    inbox: Inbox, greet: Greet, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear = greet(ALICE)
    assert isinstance(hear(), Progress) and isinstance(hear(), Progress)
    is_busy, may_go_on = threading.Event(), threading.Event()

    def refresh() -> bool:
        is_busy.set()
        assert may_go_on.wait(PATIENCE_S)
        return False

    monkeypatch.setattr(inbox._gatekeeper, "refresh", refresh)
    inbox.announce(Progress("loading", 0.5))
    assert is_busy.wait(PATIENCE_S)
    inbox.announce(Refused("start", "why"))
    closer = threading.Thread(target=inbox.close)
    closer.start()
    while not inbox._closing:
        pass
    may_go_on.set()
    while isinstance(answer := hear(), Progress):
        pass
    assert answer == Refused("start", "why")
    closer.join(PATIENCE_S)


def test_a_client_that_puts_something_else_in_the_place_of_its_socket_harms_nobody(
    inbox: Inbox, greet: Greet, tmp_path: Path
) -> None:
    inbox.announce(WELCOME)
    hear = greet(ALICE)
    assert isinstance(hear(), Welcome)
    [path] = [path for path in tmp_path.iterdir() if path.name.startswith("x.")]
    path.unlink()
    path.mkdir()
    [(client, joined)] = inbox.take(PATIENCE_S)
    assert isinstance(joined, Joined)
    inbox.dismiss(client, "for a test")
    assert inbox.take(PATIENCE_S) == [(client, Left())]
    assert isinstance(greet(BOB)(), Welcome), "its thread lives"
    join(inbox)
    close_monitored(joined.push, linger=0)
