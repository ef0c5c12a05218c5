"""`footplate-engine`: one launched engine, clients that attach, and every way to end it."""

import asyncio
import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from footplate.backend.fail_points import VARIABLE
from footplate.frontend import AsyncLLMEngine, SamplingParams
from footplate.frontend.core_link import CoreLink
from footplate.frontend.link_keys import new_key_pair
from footplate.protocol.errors import EngineDeadError, EngineDrainingError
from footplate.protocol.keys import Guest, make_client_key, make_server_key
from footplate.protocol.messages import Welcome

from .conftest import PATIENCE_S, Program, files_in, in_time, is_gone

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
SHORT = SamplingParams(max_tokens=5, detokenize=False)
Run = Callable[..., Program]
EX_USAGE, EX_SOFTWARE, EX_CONFIG = 2, 70, 78
OURS = ["engine.sock", "engine.sock.lock", "engine.sock.steps"]


@pytest.fixture
def address(folder: Path) -> str:
    return f"ipc://{folder}/engine.sock"


@pytest.fixture
def tcp_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def launch(run: Run, address: str, *flags: str, model: str = "fake") -> Program:
    return run("-m", "footplate.frontend.launch", "--model", model, "--address", address, *flags)


def wait_until_ready(program: Program) -> int:
    """The pid of the core."""
    match = re.search(r"core process (\d+)", program.line_with(" ready in "))
    assert match is not None
    return int(match[1])


def engine_files_in(folder: Path) -> list[str]:
    """All but the socket of the launcher, which is a client like any other."""
    files = files_in(folder)
    sockets = [name for name in files if re.fullmatch(r"engine\.sock\.[0-9a-f]{11}", name)]
    launchers = [name for name in sockets if name != "engine.sock.0123456789a"]
    return [name for name in files if name not in launchers[:1]]


async def complete(engine: AsyncLLMEngine) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        outputs = [output async for output in engine.generate([20, 21], SHORT)]
    return outputs[-1].outputs[0].token_ids


async def complete_at(address: str) -> list[int]:
    async with AsyncLLMEngine.connect(address) as engine:
        return await complete(engine)


# ---- serving


async def test_a_launched_engine_says_what_it_serves_and_serves_it(run: Run, address: str) -> None:
    program = launch(run, address, "--max-model-len", "100", "--block-size", "8")
    ready = program.line_with(" ready in ")
    for fact in ("fake", address, "max_model_len 100", "KV blocks of 8", "core process"):
        assert fact in ready
    assert len(await complete_at(address)) == 5


async def test_clients_attach_leave_and_come_back(run: Run, address: str, folder: Path) -> None:
    program = launch(run, address)
    wait_until_ready(program)
    async with AsyncLLMEngine.connect(address) as staying:
        stream = await staying.add_request("same", [20], FOREVER)
        for _ in range(3):
            assert len(await complete_at(address)) == 5
        assert (await anext(stream)).outputs[0].token_ids
        stream.close()
    assert await asyncio.to_thread(in_time, lambda: engine_files_in(folder) == OURS)
    assert program.process.poll() is None


async def test_it_serves_over_tcp(run: Run, tcp_address: str) -> None:
    program = launch(run, tcp_address, "--insecure-tcp")
    wait_until_ready(program)
    async with AsyncLLMEngine.connect(tcp_address, insecure_tcp=True) as engine:
        assert len(await complete(engine)) == 5
    program.signal(signal.SIGTERM)
    assert program.status() == 0


async def test_it_serves_over_tcp_with_keys(run: Run, tcp_address: str, folder: Path) -> None:
    key_dir, pair, key_file = folder / "keys", new_key_pair(), folder / "alice.key"
    make_server_key(key_dir, new_key_pair())
    make_client_key(key_dir, "alice", pair, key_file, Guest(public_key=pair.public_key))
    address = tcp_address.replace("127.0.0.1", "0.0.0.0")
    program = launch(run, address, "--key-dir", str(key_dir))
    wait_until_ready(program)  # its launcher has come in, with a key of its own
    async with AsyncLLMEngine.connect(tcp_address, key_file=str(key_file)) as engine:
        assert len(await complete(engine)) == 5
    program.signal(signal.SIGTERM)
    assert program.status() == 0


def test_it_does_not_start_with_keys_that_others_can_read(
    run: Run, tcp_address: str, folder: Path
) -> None:
    make_server_key(folder / "keys", new_key_pair())
    (folder / "keys" / "server.key").chmod(0o644)
    program = launch(run, tcp_address, "--key-dir", f"{folder}/keys")
    assert program.status() == EX_CONFIG
    said = program.rest()
    assert f"chmod 600 {folder}/keys/server.key" in said and "Traceback" not in said


# ---- ending


async def test_a_signal_while_its_core_is_replaced_lets_requests_finish_too(
    run: Run, address: str
) -> None:
    program = launch(run, address)
    core = wait_until_ready(program)
    async with AsyncLLMEngine.connect(address) as engine:
        stream = await engine.add_request(None, [20], FOREVER)
        await anext(stream)
        os.kill(core, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while engine.is_running:  # noqa: ASYNC110
                await asyncio.sleep(0)
        program.signal(signal.SIGTERM)
        reasons = [output.outputs[0].finish_reason async for output in stream]
        assert reasons[-1] == "length"
    assert program.status() == 0


async def test_a_core_that_is_killed_while_it_is_drained_is_followed_by_one_that_waits_for_clients(
    run: Run, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = launch(run, address)
    core = wait_until_ready(program)
    connect = CoreLink.connect

    async def connect_late(self: CoreLink, timeout_s: float) -> Welcome:
        await asyncio.sleep(0.3)  # the next core has been there for long by then
        return await connect(self, timeout_s)

    async with AsyncLLMEngine.connect(address) as engine:
        stream = await engine.add_request(None, [20], FOREVER)
        await anext(stream)
        monkeypatch.setattr(CoreLink, "connect", connect_late)
        program.signal(signal.SIGTERM)
        program.line_with("1 requests are left")
        os.kill(core, signal.SIGKILL)
        reasons = [output.outputs[0].finish_reason async for output in stream]
        assert reasons[-1] == "length"
    assert program.status() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_requests_finish_and_nothing_is_left(
    run: Run, address: str, folder: Path, number: signal.Signals
) -> None:
    program = launch(run, address)
    core = wait_until_ready(program)
    async with AsyncLLMEngine.connect(address) as engine:
        stream = await engine.add_request(None, [20], FOREVER)
        await anext(stream)
        program.signal(number)
        program.line_with("1 requests are left")
        with pytest.raises(EngineDrainingError):
            while True:  # it says so before it tells the core
                await complete(engine)
        reasons = [output.outputs[0].finish_reason async for output in stream]
        assert reasons[-1] == "length"
        with pytest.raises(EngineDeadError, match="the engine was stopped"):
            while True:  # it may live for a moment behind the last request
                with suppress(EngineDrainingError):
                    await complete(engine)
    assert program.status() == 0
    assert is_gone(core)
    assert files_in(folder) == []
    assert "Traceback" not in program.rest()


@pytest.mark.parametrize("way", ["at its deadline", "at a second signal"])
async def test_what_does_not_finish_is_aborted(
    run: Run, address: str, folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As fast as a model, so that the client is not thousands of steps behind on a busy machine:
    # who is, does not hear the end within the time that is left for it.
    monkeypatch.setenv(VARIABLE, "runner.execute:sleep=0.001")
    program = launch(run, address, "--drain-timeout-s", "0.2" if "deadline" in way else "60")
    wait_until_ready(program)
    async with AsyncLLMEngine.connect(address) as engine:
        stream = await engine.add_request(
            None, [20], SamplingParams(max_tokens=30_000, detokenize=False, stream_interval=100)
        )
        parked = await engine.add_request(None, [21], FOREVER)  # nobody reads it
        await anext(stream)
        program.signal(signal.SIGTERM)
        if "second" in way:
            program.line_with("requests are left")
            program.signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            reasons = [output.outputs[0].finish_reason async for output in parked]
            assert reasons[-1] == "abort"
            async for _ in stream:
                pass
    assert program.status() == 0
    assert files_in(folder) == []


@pytest.mark.parametrize("moment", ["engine.sock.lock", "engine.sock"])
def test_a_signal_while_it_starts_ends_it_as_well(
    run: Run, address: str, folder: Path, moment: str
) -> None:
    program = launch(run, address)
    assert in_time(lambda: moment in files_in(folder))
    children = program.children
    sent = time.monotonic()
    program.signal(signal.SIGTERM)
    assert program.status() == 0
    assert time.monotonic() - sent < 2
    assert all(map(is_gone, children))
    assert files_in(folder) == []


def test_a_killed_launcher_takes_its_core_and_every_file_along(
    run: Run, address: str, folder: Path
) -> None:
    program = launch(run, address)
    core = wait_until_ready(program)
    program.signal(signal.SIGKILL)
    assert in_time(lambda: is_gone(core), seconds=2)
    assert in_time(lambda: not files_in(folder), seconds=2)


def test_a_core_killed_too_often_ends_its_launcher_with_the_signals_name(
    run: Run, address: str
) -> None:
    program = launch(run, address, "--max-restarts", "0")
    os.kill(wait_until_ready(program), signal.SIGKILL)
    assert program.status() == EX_SOFTWARE
    assert "killed by SIGKILL" in program.rest()


# ---- refusals


@pytest.mark.parametrize("link", ["ipc", "tcp"])
async def test_a_second_engine_on_an_address_is_refused_before_it_loads_anything(
    run: Run, address: str, tcp_address: str, folder: Path, link: str
) -> None:
    flags = ["--insecure-tcp"] if link == "tcp" else []
    if link == "tcp":
        address = tcp_address
    first = launch(run, address, *flags)
    core = wait_until_ready(first)
    files_before = files_in(folder)
    second = launch(run, address, *flags, model=f"{folder}/nowhere")
    assert second.status() == EX_CONFIG
    said = second.rest()
    assert address.removeprefix("ipc://") in said
    assert " ready in " not in said and "nowhere" not in said and "Traceback" not in said
    assert f"process {core}" in said
    assert files_in(folder) == files_before
    async with AsyncLLMEngine.connect(address, insecure_tcp=link == "tcp") as engine:
        assert len(await complete(engine)) == 5


async def test_what_a_killed_engine_left_behind_is_no_obstacle(
    run: Run, address: str, folder: Path
) -> None:
    first = launch(run, address)
    core = wait_until_ready(first)
    os.kill(core, signal.SIGSTOP)  # so that neither can clean up behind the other
    assert in_time(lambda: psutil.Process(core).status() == psutil.STATUS_STOPPED)
    first.signal(signal.SIGKILL)
    first.status()
    os.kill(core, signal.SIGKILL)
    assert in_time(lambda: is_gone(core))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{folder}/engine.sock.0123456789a")  # a client's that was killed, too
    assert engine_files_in(folder) == sorted([*OURS, "engine.sock.0123456789a"])
    second = launch(run, address)
    wait_until_ready(second)
    assert engine_files_in(folder) == OURS
    assert len(await complete_at(address)) == 5
    second.signal(signal.SIGTERM)
    assert second.status() == 0
    assert files_in(folder) == []


async def test_a_client_that_waits_for_an_engine_keeps_its_socket_when_one_comes(
    run: Run, address: str
) -> None:
    engine = AsyncLLMEngine.connect(address)
    starting = asyncio.create_task(engine.start())
    launch(run, address)
    async with asyncio.timeout(PATIENCE_S):
        await starting
    assert len(await complete(engine)) == 5
    engine.shutdown()


@pytest.mark.parametrize("kind", ["file", "link to a file", "dangling link", "folder"])
def test_what_is_in_the_way_and_no_socket_is_refused_and_left_alone(
    run: Run, address: str, folder: Path, kind: str
) -> None:
    path, elsewhere = folder / "engine.sock", folder / "precious"
    match kind:
        case "file":
            path.write_text("precious")
        case "link to a file":
            elsewhere.write_text("precious")
            path.symlink_to(elsewhere)
        case "dangling link":
            path.symlink_to(elsewhere)
        case "folder":
            path.mkdir()
    before = files_in(folder)
    program = launch(run, address)
    assert program.status() == EX_CONFIG
    assert f"{path} exists and is not a socket" in program.rest()
    assert files_in(folder) == before
    assert path.is_symlink() == ("link" in kind)
    if "file" in kind:
        assert path.read_text() == "precious"


def test_a_lock_that_somebody_else_holds_is_respected(run: Run, address: str, folder: Path) -> None:
    with (folder / "engine.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        program = launch(run, address)
        assert program.status() == EX_CONFIG
        assert "process 4711" in program.rest()
    assert files_in(folder) == ["engine.sock.lock"]


def test_a_link_in_place_of_the_lock_is_not_followed(run: Run, address: str, folder: Path) -> None:
    (folder / "precious").write_text("precious")
    (folder / "engine.sock.lock").symlink_to(folder / "precious")
    program = launch(run, address)
    assert program.status() != 0
    assert (folder / "precious").read_text() == "precious"


def test_a_folder_that_others_may_write_to_is_refused(run: Run, address: str, folder: Path) -> None:
    folder.chmod(0o777)
    program = launch(run, address)
    assert program.status() == EX_CONFIG
    said = program.rest()
    assert str(folder) in said and "Traceback" not in said
    assert files_in(folder) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--dtype", "float64"], "float64"),
        (["--block-size", "many"], "many"),
        (["--block-size", "0"], "block_size=0"),
        (["--address", "tcp://10.0.0.1:5555"], "loopback"),
        (["--address", "tcp://10.0.0.1:5555", "--insecure-tcp"], "loopback"),
        (["--address", "tcp://127.0.0.1:5555"], "insecure_tcp"),
        (["--address", "engine.sock"], "address="),
        (["stray"], "stray"),
    ],
)
def test_a_flag_that_makes_no_sense_is_a_usage_error(
    run: Run, flags: list[str], words: str
) -> None:
    program = run("-m", "footplate.frontend.launch", "--model", "fake", *flags)
    assert program.status() == EX_USAGE
    said = program.rest()
    assert words in said and "Traceback" not in said


def test_a_start_that_fails_says_why_and_leaves_nothing(
    run: Run, address: str, folder: Path
) -> None:
    program = launch(run, address, "--max-model-len", "99", "--num-gpu-blocks-override", "1")
    assert program.status() == EX_SOFTWARE
    said = program.rest()
    assert said.count("max_model_len=99 does not fit") == 1
    assert "Traceback" not in said
    assert files_in(folder) == []
