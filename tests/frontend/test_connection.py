"""The client's end of the link, against a core that the test plays."""

import asyncio
import gc
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from footplate.frontend import connection as connection_module
from footplate.frontend.connection import MAX_MESSAGES_PER_TURN, Connection
from footplate.frontend.loss import Loss, LossKind
from footplate.protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES
from footplate.protocol.errors import (
    EngineStartError,
    MessageTooLargeError,
    ProtocolMismatchError,
)
from footplate.protocol.links import ipc_path
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    ControlReply,
    CoreMessage,
    EngineFailed,
    GetStats,
    Goodbye,
    Progress,
    Refused,
)
from footplate.protocol.token_params import TokenParams

from .scripted_core import PATIENCE_S, WELCOME, ScriptedCore

PARAMS = TokenParams(1.0, 1.0, 0, 0.0, 0, 1, 0, ())

pytestmark = pytest.mark.usefixtures("nothing_is_lost")


class Ear:
    """What a connection told its owner, and a way to wait for it."""

    def __init__(self) -> None:
        self.messages: list[CoreMessage] = []
        self.losses: list[Loss] = []
        self.progress: list[Progress] = []
        self._news = asyncio.Event()

    def connect(self, address: str) -> Connection:
        return Connection(address, b"", self._on_messages, self._on_lost, self._on_progress)

    def _on_messages(self, messages: list[CoreMessage]) -> None:
        self.messages += messages
        self._news.set()

    def _on_lost(self, loss: Loss) -> None:
        self.losses.append(loss)
        self._news.set()

    def _on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)
        self._news.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def address(tmp_path: Path) -> str:
    # Not below tmp_path: its name would not fit into a socket address.
    return f"ipc://{tmp_path}/engine.sock"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("link")


@asynccontextmanager
async def linked(address: str, ear: Ear) -> AsyncIterator[tuple[ScriptedCore, Connection]]:
    """A core and a connection that it has welcomed."""
    with ScriptedCore.at(address) as core:
        connection = ear.connect(address)
        try:
            opening = asyncio.create_task(connection.open(PATIENCE_S))
            await core.accept()
            await opening
            yield core, connection
        finally:
            connection.close()


# ---- opening


async def test_a_core_that_is_ready_is_told_who_comes_and_answers(address: str) -> None:
    with ScriptedCore.at(address) as core:
        connection = Ear().connect(address)
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.accept()
        assert await opening == WELCOME
        assert core.hello is not None
        assert core.hello.version == PROTOCOL_VERSION
        assert core.hello.output_endpoint.startswith(f"{address}.")
        connection.close()


async def test_a_core_that_is_starting_reports_progress_and_then_answers(address: str) -> None:
    ear = Ear()
    with ScriptedCore.at(address) as core:
        connection = ear.connect(address)
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.hear_hello()
        phases = [Progress("loading", 0.25), Progress("loading", 0.5), Progress("warming", 0.0)]
        for phase in phases:
            await core.answer(phase)
        await ear.until(lambda: len(ear.progress) == len(phases))
        assert ear.progress == phases
        assert not opening.done()
        await core.answer(WELCOME)
        assert await opening == WELCOME
        connection.close()


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (Refused("protocol", "core 2.0, client 1.0"), ProtocolMismatchError),
        (Refused("start", "no such folder"), EngineStartError),
        (Refused("a kind of the future", "why"), EngineStartError),
    ],
)
async def test_a_refusal_is_an_error_with_the_cores_reason(
    address: str, refusal: Refused, error: type[EngineStartError]
) -> None:
    with ScriptedCore.at(address) as core:
        connection = Ear().connect(address)
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.hear_hello()
        await core.answer(refusal)
        with pytest.raises(error, match=refusal.reason) as caught:
            await opening
        assert type(caught.value) is error
        connection.close()


async def test_a_core_that_never_answers_is_an_error_at_the_deadline(address: str) -> None:
    with ScriptedCore.at(address):
        connection = Ear().connect(address)
        with pytest.raises(EngineStartError, match=r"within 0\.05 s") as caught:
            await connection.open(0.05)
        assert address in str(caught.value)
        connection.close()


async def test_a_core_that_is_not_there_yet_may_come_before_the_deadline(address: str) -> None:
    connection = Ear().connect(address)
    opening = asyncio.create_task(connection.open(PATIENCE_S))
    await asyncio.sleep(0)
    with ScriptedCore.at(address) as core:
        await core.accept()
        assert await opening == WELCOME
        connection.close()


async def test_an_address_in_a_folder_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(EngineStartError, match="no engine listens on"):
        Ear().connect("ipc:///nowhere/at/all/engine.sock")


async def test_a_core_that_dies_before_its_welcome_is_reported(address: str) -> None:
    ear = Ear()
    with ScriptedCore.at(address) as core:
        connection = ear.connect(address)
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.hear_hello()
        core.close()
        await ear.until(lambda: ear.losses)
        connection.refuse(EngineStartError("killed"))  # what its owner does
        with pytest.raises(EngineStartError, match="killed"):
            await opening
        connection.close()


async def test_a_core_that_dies_right_after_its_welcome_does_not_go_unnoticed(
    address: str,
) -> None:
    with ScriptedCore.at(address) as core:
        connection = Ear().connect(address)
        # The loss is known before `open` has had its turn, as when both were read in one go.
        connection._welcome.add_done_callback(
            lambda _: connection.refuse(EngineStartError("killed"))
        )
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.accept()
        with pytest.raises(EngineStartError, match="killed"):
            await opening
        connection.close()


async def test_it_works_over_tcp(unused_tcp_port: int) -> None:
    ear = Ear()
    async with linked(f"tcp://127.0.0.1:{unused_tcp_port}", ear) as (core, _):
        await core.push(EngineFailed("why"))
        await ear.until(lambda: ear.messages)


# ---- receiving


async def test_messages_arrive_in_order_however_many_come_at_once(address: str) -> None:
    ear = Ear()
    async with linked(address, ear) as (core, _):
        replies = [ControlReply(call, True) for call in range(5 * MAX_MESSAGES_PER_TURN)]
        for reply in replies:
            await core.push(reply)
        await ear.until(lambda: len(ear.messages) >= len(replies))
        assert ear.messages == replies


async def test_frames_that_are_no_messages_are_counted_and_the_next_message_arrives(
    address: str,
) -> None:
    ear = Ear()
    async with linked(address, ear) as (core, connection):
        garbage = [b"", b"\xc1", b"\x91" * 100_000, b"\x92\xa5eject\x90", b"\x91\xa3bye"]
        for frame in garbage:
            await core.push(frame)
        await core.push(ControlReply(1, True))
        await ear.until(lambda: ear.messages)
        for frame in garbage:
            await core.answer(frame)
        await core.answer(Progress("after the garbage", 0.0))
        await ear.until(lambda: ear.progress)
        assert ear.messages == [ControlReply(1, True)]
        assert connection.num_bad_messages == 2 * len(garbage)
        assert not ear.losses


async def test_the_last_words_of_a_core_come_before_its_loss(address: str) -> None:
    ear = Ear()
    async with linked(address, ear) as (core, _):
        words = [ControlReply(call, True) for call in range(2 * MAX_MESSAGES_PER_TURN)]
        for word in words:
            await core.push(word)
        await core.push(EngineFailed("out of memory"))
        core.close()
        await ear.until(lambda: ear.losses)
        assert ear.messages == [*words, EngineFailed("out of memory")]
        assert ear.losses == [Loss("the engine core closed the connection")]


@pytest.mark.parametrize(
    ("kind", "known"), [("dismissed", LossKind.DISMISSED), ("revoked", LossKind.GONE)]
)
async def test_a_core_that_serves_a_client_no_longer_says_why_and_what_came_before_is_read(
    address: str, kind: str, known: LossKind
) -> None:
    ear = Ear()
    async with linked(address, ear) as (core, _):
        words = [ControlReply(call, True) for call in range(2 * MAX_MESSAGES_PER_TURN)]
        for word in words:
            await core.push(word)
        await core.answer(Refused(kind, "too much left unread"))
        core.close_push()
        await ear.until(lambda: ear.losses)
        assert ear.messages == words
        assert ear.losses == [Loss("too much left unread", known)]


# ---- sending


async def test_messages_are_heard_in_the_order_in_which_they_were_sent(address: str) -> None:
    async with linked(address, Ear()) as (core, connection):
        for call in range(100):
            connection.send(GetStats(call))
        assert [await core.hear() for _ in range(100)] == [GetStats(call) for call in range(100)]


async def test_messages_that_are_gathered_arrive_together_and_before_what_is_said_later(
    address: str,
) -> None:
    async with linked(address, Ear()) as (core, connection):
        for call in range(3):
            connection.send(GetStats(call), gather=True)
        await asyncio.sleep(0)  # the turn is over
        for call in range(3, 5):
            connection.send(GetStats(call), gather=True)
        connection.send(GetStats(5))
        assert [await core.hear() for _ in range(6)] == [GetStats(call) for call in range(6)]
        assert core.num_frames == [1, 3, 2, 1]  # the first was Hello


async def test_more_than_a_message_takes_are_gathered_into_several(address: str) -> None:
    async with linked(address, Ear()) as (core, connection):
        for call in range(MAX_FRAMES + 1):
            connection.send(GetStats(call), gather=True)
        heard = [await core.hear() for _ in range(MAX_FRAMES + 1)]
        assert heard == [GetStats(call) for call in range(MAX_FRAMES + 1)]
        assert core.num_frames == [1, MAX_FRAMES, 1]


async def test_closing_forgets_what_was_gathered(address: str) -> None:
    async with linked(address, Ear()) as (core, connection):
        connection.send(GetStats(1), gather=True)
        connection.close()
        await asyncio.sleep(0)
        assert await core.hear() == Goodbye()


async def test_an_oversized_message_is_refused_here_and_costs_nobody_the_connection(
    address: str,
) -> None:
    async with linked(address, Ear()) as (core, connection):
        too_long = AddRequest(1, [2**31] * (MAX_FRAME_BYTES // 5 + 1), PARAMS)
        with pytest.raises(MessageTooLargeError, match=str(MAX_FRAME_BYTES)):
            connection.send(too_long)
        connection.send(GetStats(1))
        assert await core.hear() == GetStats(1)


async def test_the_largest_message_arrives(address: str) -> None:
    async with linked(address, Ear()) as (core, connection):
        message = AddRequest(1, [2**31] * (MAX_FRAME_BYTES // 5 - 100), PARAMS)
        connection.send(message)
        assert await core.hear() == message


async def test_what_the_core_does_not_take_is_kept_in_order(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SEND_HIGH_WATER_MARK", 4)
    connection = Ear().connect(address)
    opening = asyncio.create_task(connection.open(PATIENCE_S))
    await asyncio.sleep(0)
    for number in range(100):
        connection.send(AbortRequests([number]))
    waiting = [asyncio.create_task(connection.has_room()) for _ in range(3)]
    done, _ = await asyncio.wait(waiting, timeout=0.01)
    assert not done
    waiting.pop().cancel()  # one that gives up takes nobody along
    with ScriptedCore.at(address) as core:
        await core.accept()
        await opening
        heard = [await core.hear() for _ in range(100)]
        assert heard == [AbortRequests([number]) for number in range(100)]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*waiting)
            await connection.has_room()
        connection.close()


async def test_closing_ends_the_wait_for_room(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SEND_HIGH_WATER_MARK", 4)
    connection = Ear().connect(address)
    opening = asyncio.create_task(connection.open(PATIENCE_S))
    await asyncio.sleep(0)
    for number in range(100):
        connection.send(AbortRequests([number]))
    waiting = asyncio.create_task(connection.has_room())
    await asyncio.sleep(0)
    connection.close()
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    with pytest.raises(asyncio.CancelledError):
        await opening


# ---- closing


def sockets_beside(address: str) -> list[Path]:
    path = ipc_path(address)
    assert path is not None
    return list(path.parent.glob(f"{path.name}.*"))


async def test_closing_says_goodbye_and_leaves_no_file(address: str) -> None:
    async with linked(address, Ear()) as (core, connection):
        (path,) = sockets_beside(address)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connection.close()
        assert sockets_beside(address) == []
        assert await core.hear() == Goodbye()
        connection.close()


async def test_a_dropped_connection_leaves_no_file(address: str) -> None:
    connection = Ear().connect(address)
    assert len(sockets_beside(address)) == 1
    del connection
    gc.collect()
    assert sockets_beside(address) == []


def test_a_connection_can_be_closed_after_its_event_loop(address: str) -> None:
    async def connect() -> Any:
        connection = Ear().connect(address)
        with pytest.raises(EngineStartError):
            await connection.open(0.01)
        return connection

    connection = asyncio.run(connect())
    connection.close()
    assert sockets_beside(address) == []


async def test_last_words_that_come_behind_the_end_of_the_other_socket_are_heard(
    address: str,
) -> None:
    ear = Ear()
    async with linked(address, ear) as (core, connection):
        await core.push(ControlReply(1, True))
        await ear.until(lambda: ear.messages)
        core.close_router()
        assert connection._monitor.poll(int(1000 * PATIENCE_S))
        connection._read_monitor()
        assert ear.losses == []  # what it says of itself is still to come
        await core.push(EngineFailed("out of memory"))
        core.close()
        await ear.until(lambda: ear.losses)
        assert ear.messages[1:] == [EngineFailed("out of memory")]
        assert ear.losses == [Loss("the engine core closed the connection")]


async def test_a_connection_that_its_last_words_have_closed_is_not_lost_as_well(
    tmp_path: Path,
) -> None:
    lost: list[Loss] = []
    with ScriptedCore.at(f"ipc://{tmp_path}/engine.sock") as core:
        connection = Connection(
            core.address,
            b"session",
            on_messages=lambda messages: connection.close(),
            on_lost=lost.append,
            on_progress=lambda progress: None,
        )
        opening = asyncio.create_task(connection.open(PATIENCE_S))
        await core.accept()
        await opening
        await core.push(EngineFailed("out of memory"))
        core.close()
        # Both are there before the event loop has a turn, and it happens to begin with the end.
        assert connection._pull.poll(int(1000 * PATIENCE_S))
        assert connection._monitor.poll(int(1000 * PATIENCE_S))
        connection._read_monitor()
    assert lost == []
