"""What cannot be told to one client is no reason to end the core."""

from typing import Any

import msgspec
import pytest

from footplate.backend.core_process import _Voice
from footplate.protocol import codec
from footplate.protocol.messages import ControlReply, EngineFailed, StepOutputs

ALICE, BOB = b"alice", b"bob"


class Surroundings:
    """Core, inbox and outbox in one: what is called on them."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bytes]] = []
        self.left: list[bytes] = []
        self.dismissed: list[tuple[bytes, str]] = []
        self.has_room = True

    def send(self, client: bytes, frame: bytes) -> bool:
        self.sent.append((client, frame))
        return self.has_room

    def is_insider(self, client: bytes) -> bool:
        return True

    def leave(self, client: bytes, *, may_return: bool) -> None:
        assert may_return, "its session may have another connection"
        self.left.append(client)

    def dismiss(self, client: bytes, reason: str) -> None:
        self.dismissed.append((client, reason))


@pytest.fixture
def around() -> Surroundings:
    return Surroundings()


@pytest.fixture
def voice(around: Surroundings) -> _Voice:
    anything: Any = around
    return _Voice(anything, anything, anything)


def test_a_message_is_sent_to_its_client(voice: _Voice, around: Surroundings) -> None:
    reply = ControlReply(1, True)
    voice.tell(ALICE, reply)
    assert around.sent == [(ALICE, codec.Encoder().encode(reply))]
    assert not around.dismissed


def test_a_client_whose_message_is_too_large_is_served_no_longer(
    voice: _Voice, around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 100)
    voice.tell(ALICE, EngineFailed("x" * 200))
    voice.tell(BOB, EngineFailed("x"))
    assert around.left == [ALICE]
    [(client, reason)] = around.dismissed
    assert client == ALICE and "MessageTooLargeError" in reason and "100" in reason
    assert [client for client, _ in around.sent] == [BOB]


@pytest.mark.parametrize("value", [1j, object(), "\ud800", 2**70])
def test_so_is_one_whose_message_has_a_value_that_no_message_holds(
    voice: _Voice, around: Surroundings, value: Any
) -> None:
    voice.tell(ALICE, msgspec.structs.replace(StepOutputs(1, [], [], []), token_ids=[value]))
    assert around.left == [ALICE] and not around.sent


def test_one_that_reads_nothing_is_told_why_it_is_served_no_longer(
    voice: _Voice, around: Surroundings
) -> None:
    around.has_room = False
    voice.tell(ALICE, ControlReply(1, True))
    assert around.dismissed == [(ALICE, "the client left too much of its output unread")]
