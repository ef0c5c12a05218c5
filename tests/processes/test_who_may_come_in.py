"""A core on tcp: who is let in, what they may do, and that nobody else disturbs them."""

import asyncio
import os
import random
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from footplate.frontend import AsyncLLMEngine, SamplingParams
from footplate.frontend.link_keys import new_key_pair
from footplate.protocol.codec import MAX_FRAME_BYTES, Encoder
from footplate.protocol.errors import (
    EngineDeadError,
    EngineStartError,
    InvalidParameterError,
    KeyFileError,
    KeyRefusedError,
    QueueOverflowError,
    RequestFailedError,
)
from footplate.protocol.keys import ClientKeys, read_client_keys
from footplate.protocol.links import new_client_id
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    ControlReply,
    Drain,
    Hello,
    Refused,
    ResetPrefixCache,
)
from footplate.protocol.token_params import TokenParams

from .conftest import PATIENCE_S, in_time
from .guarded import GuardedCore, curve_client, guarded_core, proxy
from .raw_client import PATIENCE_MS, CurveClient

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
SHORT = SamplingParams(max_tokens=5, detokenize=False)
PROMPT = [20, 21]
PARAMS = TokenParams(1.0, 1.0, 0, 0.0, 0, 30_000, 0, ())


@pytest.fixture(scope="module")
def core() -> Iterator[GuardedCore]:
    """One for all tests that leave it as it was."""
    with guarded_core() as core:
        core.make_key("witness", role="admin")
        core.make_key("writer")
        yield core


@pytest.fixture
def witness(core: GuardedCore) -> Iterator[CurveClient]:
    with curve_client(core.address, f"{core.folder}/witness.key") as client:
        client.join()
        yield client


def key_of(core: GuardedCore, name: str) -> str:
    return f"{core.folder}/{name}.key"


async def complete(engine: AsyncLLMEngine, params: SamplingParams = SHORT) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        outputs = [output async for output in engine.generate(PROMPT, params)]
    return outputs[-1].outputs[0].token_ids


async def start_error(engine: AsyncLLMEngine) -> BaseException:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await engine.start()
    except Exception as error:
        return error
    finally:
        engine.shutdown()
    raise AssertionError("it was let in")


# ---- let in


async def test_clients_with_a_key_are_served(core: GuardedCore) -> None:
    for name in ("witness", "writer"):
        async with core.connect(key_of(core, name)) as engine:
            assert len(await complete(engine)) == 5


async def test_two_clients_with_one_key_are_two_clients(core: GuardedCore) -> None:
    async with (
        core.connect(key_of(core, "writer")) as first,
        core.connect(key_of(core, "writer")) as second,
    ):
        stream = await first.add_request("same", PROMPT, FOREVER)
        assert len(await complete(second)) == 5
        await anext(stream)
        stream.close()


async def test_a_core_that_listens_everywhere_lets_in_a_client_from_another_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no way out, so no address of its own")
        own_host = probe.getsockname()[0]
    with guarded_core("0.0.0.0") as core:
        port = core.address.rpartition(":")[2]
        key_file = core.make_key("remote", role="admin")
        away = AsyncLLMEngine.connect(f"tcp://{own_host}:{port}", key_file=key_file)
        home = AsyncLLMEngine.connect(core.address, key_file=key_file)
        async with away, home:
            assert len(await complete(away)) == len(await complete(home)) == 5
            # What is a path here leads nowhere there.
            assert "/" not in away._session.welcome.model.tokenizer
            assert away.process_id == 0
            assert home._session.welcome.model.tokenizer.startswith("/")
            assert home.process_id == core.process.process_id


# ---- not let in


async def test_a_key_that_the_engine_does_not_know_is_refused_at_once(
    core: GuardedCore, witness: CurveClient
) -> None:
    known = read_client_keys(Path(key_of(core, "writer")))
    stranger = new_key_pair()
    key_file = core.folder / "stranger.key"
    keys = ClientKeys(stranger.public_key, stranger.secret_key, known.server_public_key)
    key_file.write_bytes(msgspec.json.encode(keys))
    key_file.chmod(0o600)
    before = witness.stats().num_rejected_peers
    error = await start_error(core.connect(str(key_file)))
    assert isinstance(error, KeyRefusedError) and "owner" in str(error)
    assert witness.stats().num_rejected_peers > before


async def test_a_client_does_not_talk_to_an_engine_that_is_not_the_one_it_means(
    core: GuardedCore,
) -> None:
    keys = read_client_keys(Path(key_of(core, "writer")))
    key_file = core.folder / "other-engine.key"
    other = ClientKeys(keys.public_key, keys.secret_key, new_key_pair().public_key)
    key_file.write_bytes(msgspec.json.encode(other))
    key_file.chmod(0o600)
    error = await start_error(core.connect(str(key_file), timeout_s=1.0))
    assert isinstance(error, EngineStartError)


async def test_a_client_without_keys_gets_no_word_out_of_the_core(
    core: GuardedCore, witness: CurveClient
) -> None:
    before = witness.stats()
    engine = AsyncLLMEngine.connect(core.address, insecure_tcp=True, timeout_s=1.0)
    assert isinstance(await start_error(engine), EngineStartError)
    after = witness.stats()
    assert after.num_rejected_peers > before.num_rejected_peers
    assert after.num_bad_messages == before.num_bad_messages, "nothing of it was decoded"


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_a_peer_with_another_mechanism_is_counted_and_not_read(
    core: GuardedCore, witness: CurveClient, mechanism: str
) -> None:
    before = witness.stats()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if mechanism == "PLAIN":
        dealer.set(zmq.PLAIN_USERNAME, b"admin")
        dealer.set(zmq.PLAIN_PASSWORD, b"admin")
    dealer.set(zmq.RECONNECT_IVL, -1)
    dealer.connect(core.address)
    dealer.send(Encoder().encode(Hello(PROTOCOL_VERSION, "tcp://127.0.0.1:9")))
    assert in_time(lambda: witness.stats().num_rejected_peers == before.num_rejected_peers + 1)
    assert witness.stats().num_bad_messages == before.num_bad_messages
    context.destroy(linger=0)


# How a connection may begin, in the three versions of ZeroMQ's protocol and in none of them.
GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00"
GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0" * 100,
    b"\x01\x00" + b"x" * 50,
    b"\xff" + b"\0" * 8 + b"\x7f\x01\x05\x00",
    GREETING
    + b"NULL".ljust(20, b"\0")
    + b"\0" * 32
    + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06",
    GREETING + b"CURVE".ljust(20, b"\0") + b"\0" * 32 + b"\x04\xc8\x05HELLO" + b"\0" * 194,
    GREETING + b"CURVE".ljust(20, b"\0") + b"\0" * 32 + b"\x06" + b"\xff" * 8,
    b"\xff" * 200,
    b"",
]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage_is_counted_once_per_connection(
    core: GuardedCore, witness: CurveClient, number: int
) -> None:
    before = witness.stats()
    host, port = core.address.removeprefix("tcp://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(GARBAGE[number])
            with suppress(OSError):  # it has been thrown out already
                peer.shutdown(socket.SHUT_WR)
            peer.settimeout(PATIENCE_S)
            while _receive(peer):
                pass
    assert in_time(lambda: witness.stats().num_rejected_peers >= before.num_rejected_peers + 3)
    after = witness.stats()
    assert after.num_rejected_peers == before.num_rejected_peers + 3
    assert after.num_bad_messages == before.num_bad_messages


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(65536)
    except ConnectionResetError:
        return b""


async def test_strangers_cost_a_client_nothing(core: GuardedCore) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    host, port = core.address.removeprefix("tcp://").split(":")
    async with core.connect(key_of(core, "writer")) as engine:
        alone = await complete(engine, SamplingParams(max_tokens=2000, detokenize=False, seed=1))
        beside = asyncio.create_task(
            complete(engine, SamplingParams(max_tokens=2000, detokenize=False, seed=1))
        )
        for _ in range(200):
            with socket.create_connection((host, int(port))) as peer:
                peer.sendall(rng.choice([*GARBAGE, rng.randbytes(200)]))
            await asyncio.sleep(0)
        assert await beside == alone


# ---- what was said once cannot be said again


def test_a_recorded_session_says_nothing_when_it_is_played_again(
    core: GuardedCore, witness: CurveClient
) -> None:
    with proxy(core.address) as between:
        with curve_client(between.address, key_of(core, "writer")) as client:
            client.join()
            for call in range(20):
                client.say(ResetPrefixCache(call))
                client.hear_output()
        recorded = between.recorded
    assert len(recorded) > 1000
    before = witness.stats()
    host, port = core.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as peer:
        peer.sendall(recorded)
        peer.settimeout(PATIENCE_S)
        while _receive(peer):
            pass  # until it is thrown out
    assert in_time(lambda: witness.stats().num_rejected_peers == before.num_rejected_peers + 1)
    assert witness.stats().num_bad_messages == before.num_bad_messages


@pytest.mark.parametrize("how", ["a bit turned", "said twice"])
def test_frames_that_were_altered_on_the_way_end_the_connection_and_reach_nobody(
    core: GuardedCore, witness: CurveClient, how: str
) -> None:
    armed: list[bool] = []

    def alter(chunk: bytes, num_before: int) -> bytes:
        if not armed:
            return chunk
        return chunk + chunk if how == "said twice" else chunk[:-1] + bytes([chunk[-1] ^ 1])

    with (
        proxy(core.address, alter) as between,
        curve_client(between.address, key_of(core, "writer")) as client,
    ):
        client.dealer.set(zmq.RECONNECT_IVL, -1)
        client.join()
        monitor = client.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        before = witness.stats()
        armed.append(True)
        client.say(b"\xc1")  # garbage, which would be counted if it came through
        assert monitor.poll(int(1000 * PATIENCE_S)), "the connection goes on"
        num_heard = witness.stats().num_bad_messages - before.num_bad_messages
        assert num_heard == (1 if how == "said twice" else 0)
    assert witness.stats().num_bad_messages == before.num_bad_messages + num_heard


def test_an_oversized_frame_costs_its_sender_the_connection_and_others_nothing(
    core: GuardedCore, witness: CurveClient
) -> None:
    with curve_client(core.address, key_of(core, "writer")) as client:
        client.join()
        before = witness.stats()
        witness.say(AddRequest(1, PROMPT, PARAMS))
        monitor = client.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        client.say(b"\xc1" * (2 * MAX_FRAME_BYTES + 1))
        assert monitor.poll(int(1000 * PATIENCE_S)), "it may send more than is good for us"
        num_tokens = 0
        while num_tokens < PARAMS.max_tokens:
            output: Any = witness.hear_output()
            num_tokens += len(output.token_ids)
        assert witness.stats().num_bad_messages == before.num_bad_messages


# ---- what a client hears of the core, and who else can tell it something


async def test_nobody_but_the_core_can_tell_a_client_anything(core: GuardedCore) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def pusher(endpoint: str, server_key: str | None) -> zmq.Socket[bytes]:
        push = context.socket(zmq.PUSH)
        if server_key is not None:
            pair = new_key_pair()
            push.set(zmq.CURVE_SERVERKEY, server_key.encode())
            push.set(zmq.CURVE_PUBLICKEY, pair.public_key.encode())
            push.set(zmq.CURVE_SECRETKEY, pair.secret_key.encode())
        push.set(zmq.RECONNECT_IVL, -1)
        monitor = push.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        push.connect(endpoint)
        assert monitor.poll(int(1000 * PATIENCE_S))
        with suppress(zmq.Again):  # thrown out already
            push.send(b"\xc1", zmq.NOBLOCK)
        return push

    def is_let_in(push: zmq.Socket[bytes]) -> bool:
        monitor = push.get_monitor_socket()  # the one there is
        event = parse_monitor_message(monitor.recv_multipart())
        push.disable_monitor()
        monitor.close(linger=0)
        has_succeeded = bool(event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        push.close(linger=PATIENCE_MS if has_succeeded else 0)
        return has_succeeded

    async with core.connect(key_of(core, "writer")) as engine:
        connection = engine._session._link._connection
        assert connection is not None
        known = read_client_keys(Path(key_of(core, "writer")))
        # Without keys, or with those of everybody whose public key may be known.
        for server_key in (None, known.server_public_key, known.public_key):
            assert not is_let_in(pusher(connection._endpoint, server_key))
        assert len(await complete(engine)) == 5
        assert connection.num_bad_messages == 0
        # Only the core was told the one that opens, and nothing else keeps the others out.
        assert is_let_in(pusher(connection._endpoint, connection._output_key))
        async with asyncio.timeout(PATIENCE_S):
            while not connection.num_bad_messages:
                assert await complete(engine)
    context.destroy(linger=0)


def test_what_is_on_the_wire_tells_neither_prompt_nor_key_of_the_output(core: GuardedCore) -> None:
    secret = [0x41424344] * 50
    with (
        proxy(core.address) as between,
        curve_client(between.address, key_of(core, "writer")) as client,
    ):
        client.join()
        client.say(AddRequest(1, secret, PARAMS))
        client.hear_output()
        assert b"ABCDABCD" not in between.recorded and b"hello" not in between.recorded
        assert client.output_key.encode() not in between.recorded
        assert z85.decode(client.output_key) not in between.recorded


@pytest.mark.parametrize("output_key", ["", "x", "~" * 40, "0" * 39, "0" * 41])
def test_a_client_that_names_no_key_for_its_output_is_refused(
    core: GuardedCore, output_key: str
) -> None:
    with curve_client(core.address, key_of(core, "writer")) as client:
        client.say(msgspec.structs.replace(client.hello(), output_key=output_key))
        answer = client.hear()
        assert isinstance(answer, Refused) and answer.kind == "hello"
        assert "/" not in answer.reason and "127" not in answer.reason


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.1:80", "ipc:///etc/passwd", "inproc://x"])
def test_a_core_connects_to_no_place_that_a_client_is_not(core: GuardedCore, endpoint: str) -> None:
    with curve_client(core.address, key_of(core, "writer")) as client:
        client.say(msgspec.structs.replace(client.hello(), output_endpoint=endpoint))
        answer = client.hear()
        assert isinstance(answer, Refused) and answer.kind == "hello"


def test_a_routing_id_is_no_proof_of_who_one_is(core: GuardedCore, witness: CurveClient) -> None:
    client_id, num_before = new_client_id(), witness.stats().num_bad_messages
    with curve_client(core.address, key_of(core, "writer"), client_id) as client:
        client.join()
        client.dealer.close(linger=0)  # its PULL stays, and with it its place in the core

        def thief_is_heard() -> bool:
            # One that comes before the other's connection has ended is ignored for good.
            with curve_client(core.address, key_of(core, "witness"), client_id) as thief:
                thief.say(AddRequest(1, PROMPT, PARAMS))
                return in_time(lambda: witness.stats().num_bad_messages > num_before, 0.2)

        assert in_time(thief_is_heard)
        stats = witness.stats()
        assert stats.num_running + stats.num_waiting == 0
        assert not client.pull.poll(0)


# ---- roles


@pytest.mark.parametrize("call", [ResetPrefixCache(7), Drain(7), Drain(7, 0.0)])
def test_only_an_admin_may_ask_for_what_concerns_the_others(
    core: GuardedCore, call: ResetPrefixCache | Drain
) -> None:
    with curve_client(core.address, key_of(core, "writer")) as client:
        assert client.join().role == "generate"
        client.say(call)
        reply = client.hear_output()
        name = type(call).__name__
        assert reply == ControlReply(
            7, False, f"{name} needs the role admin, this key has the role generate"
        )
        assert client.stats()


async def test_the_calls_of_an_engine_say_who_may_make_them(core: GuardedCore) -> None:
    async with core.connect(key_of(core, "witness")) as engine:
        assert await engine.reset_prefix_cache()
    with curve_client(core.address, key_of(core, "witness")) as client:
        assert client.join().role == "admin"


# ---- quotas


async def test_a_key_has_so_many_live_requests_and_no_more() -> None:
    with guarded_core() as core:
        limited = core.make_key("limited", max_requests=3)
        free = core.make_key("free")
        async with core.connect(limited) as first, core.connect(limited) as second:
            streams = [
                await engine.add_request(None, PROMPT, FOREVER)
                for engine in (first, second, second)
            ]
            for stream in streams:
                await anext(stream)
            for engine in (first, second):  # of all connections together
                with pytest.raises(QueueOverflowError, match="max_requests, which is 3"):
                    await complete(engine)
            async with core.connect(free) as other:
                assert len(await complete(other)) == 5
            second.shutdown()
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    try:
                        assert len(await complete(first)) == 5
                        break
                    except QueueOverflowError:
                        continue
            with pytest.raises(QueueOverflowError):
                await complete(first, SamplingParams(n=3, max_tokens=5, detokenize=False))
            streams[0].close()


# ---- revocation


async def test_a_revoked_key_ends_its_connections_and_opens_nothing_more() -> None:
    with guarded_core() as core:
        leaver, stayer = core.make_key("leaver"), core.make_key("stayer")
        async with core.connect(stayer) as staying:
            engine = core.connect(leaver)
            stream = await engine.add_request(None, PROMPT, FOREVER)
            staying_stream = await staying.add_request(None, PROMPT, FOREVER)
            await anext(stream)
            core.revoke("leaver")
            revoked_at = time.monotonic()
            with pytest.raises(EngineDeadError, match="key of leaver has been revoked"):
                async with asyncio.timeout(PATIENCE_S):
                    async for _ in stream:
                        pass
            assert time.monotonic() - revoked_at < 3  # 0.5 s on a quiet machine
            assert isinstance(await start_error(core.connect(leaver)), KeyRefusedError)
            engine.shutdown()
            await anext(staying_stream)
            stats = await staying.get_stats()
            assert stats.num_running + stats.num_waiting <= 1
            staying_stream.close()
            # A new key counts at once, under the old name as well.
            os.unlink(leaver)
            async with core.connect(core.make_key("leaver")) as again:
                assert len(await complete(again)) == 5


def test_an_idle_connection_of_a_revoked_key_ends_too_and_what_it_says_is_not_read() -> None:
    with guarded_core() as core:
        core.make_key("witness")
        with (
            curve_client(core.address, core.make_key("leaver")) as client,
            curve_client(core.address, key_of(core, "witness")) as witness,
        ):
            client.join()
            witness.join()
            core.revoke("leaver")
            answer = client.hear()
            assert answer == Refused("revoked", "the key of leaver has been revoked")
            client.say(client.hello())
            client.say(AddRequest(1, PROMPT, PARAMS))
            assert in_time(lambda: witness.stats().num_bad_messages == 2)
            assert witness.stats().num_running == 0
            assert not client.dealer.poll(0)


def test_a_role_that_changes_counts_for_connections_that_are_there() -> None:
    with guarded_core() as core, curve_client(core.address, core.make_key("riser")) as client:
        client.join()
        client.say(ResetPrefixCache(1))
        first: Any = client.hear_output()
        assert not first.ok
        path = core.key_dir / "clients" / "riser.json"
        draft = core.folder / "draft"
        draft.write_text(path.read_text().replace("generate", "admin"))
        draft.chmod(0o600)
        os.replace(draft, path)

        def is_admin() -> bool:
            client.say(ResetPrefixCache(2))
            reply: Any = client.hear_output()
            return bool(reply.ok)

        assert in_time(is_admin)


# ---- what they are told


async def test_an_error_names_no_place_to_a_client_with_a_key() -> None:
    with guarded_core(mode="step raises and names a file") as core:
        engine = core.connect(core.make_key("outsider"))
        with pytest.raises(RequestFailedError) as caught:
            await complete(engine)
        engine.shutdown()
        assert str(caught.value).endswith("RuntimeError: cannot map <path> at <address>")


# ---- key files


def test_a_client_does_not_use_a_key_file_that_others_can_open(core: GuardedCore) -> None:
    path = Path(key_of(core, "writer"))
    try:
        path.chmod(0o640)
        with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
            core.connect(str(path))
    finally:
        path.chmod(0o600)


def test_a_client_needs_a_key_file_or_says_that_it_wants_none(core: GuardedCore) -> None:
    with pytest.raises(InvalidParameterError, match="key_file"):
        AsyncLLMEngine.connect(core.address)
    with pytest.raises(KeyFileError, match="nowhere"):
        core.connect(f"{core.folder}/nowhere.key")


def test_secrets_are_in_no_command_line_no_environment_and_no_log(core: GuardedCore) -> None:
    files = [core.key_dir / "server.key", *core.folder.glob("*.key")]
    secrets = [
        line.split('"')[3].encode()
        for path in files
        for line in path.read_text().splitlines()
        if "secret_key" in line
    ]
    assert len(secrets) >= 3
    process = Path(f"/proc/{core.process.process_id}")
    if not process.exists():
        pytest.skip("only Linux shows it")
    for name in ("cmdline", "environ"):
        shown = (process / name).read_bytes()
        assert not any(secret in shown for secret in secrets)
    keys = read_client_keys(Path(key_of(core, "writer")))
    assert keys.secret_key not in repr(keys) and keys.secret_key.encode() in secrets
    assert keys.secret_key not in repr(new_key_pair())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files if path.exists())
