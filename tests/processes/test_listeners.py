"""Everything that a launch listens on, as the kernel tells it."""

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams

from .conftest import PATIENCE_S, Program
from .guarded import free_port, guarded_core

pytestmark = pytest.mark.skipif(not Path("/proc/net").is_dir(), reason="only Linux tells")
SHORT = SamplingParams(max_tokens=5, detokenize=False)
LISTENING = "0A"


def inodes_of(process_id: int) -> set[str]:
    """Of the sockets that a process has open."""
    found = set()
    for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue  # the one that lists the folder
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            found.add(match[1])
    return found


def listeners(process_ids: list[int]) -> set[str]:
    """What these processes listen on: host and port of tcp, ports of udp, paths of Unix sockets."""
    inodes = set[str]().union(*map(inodes_of, process_ids))
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "unix"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue  # this kernel has no such protocol
        for fields in map(str.split, lines):
            if table == "unix":
                if fields[6] in inodes and int(fields[3], 16) & 0x10000:  # it accepts
                    found.add(fields[7] if len(fields) > 7 else "unnamed")
            elif fields[9] in inodes and (fields[3] == LISTENING or not table.startswith("tcp")):
                address, port = fields[1].split(":")
                host = ".".join(str(byte) for byte in bytes.fromhex(address)[::-1])
                found.add(f"{table} {host}:{int(port, 16)}")
    return found


def family() -> list[int]:
    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


async def complete(engine: AsyncLLMEngine) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for _ in engine.generate([20, 21], SHORT):
            pass


async def test_an_engine_and_its_client_listen_on_two_files_of_a_private_folder() -> None:
    before = listeners(family())
    async with AsyncLLMEngine(EngineArgs(model="fake")) as engine:
        await complete(engine)
        found = listeners(family()) - before
        assert len(found) == 2, found
        core, client = sorted(found, key=len)
        assert re.fullmatch(rf"/tmp/footplate-{os.getuid()}/core-\w+/engine\.sock", core)
        assert re.fullmatch(re.escape(core) + r"\.[0-9a-f]{11}", client)
        assert os.stat(os.path.dirname(core)).st_mode & 0o777 == 0o700
        assert os.stat(client).st_mode & 0o777 == 0o600


def test_a_default_launch_listens_on_one_file(
    run: Callable[..., Program], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    program = run("-m", "footplate.frontend.launch", "--model", "fake")
    program.line_with(" ready in ")
    processes = [program.process.pid, *program.children]
    assert len(processes) == 3
    expected = {f"{folder}/footplate/engine.sock"}
    # Whoever waited for the core is a client, until it has closed its own socket.
    assert {path for path in listeners(processes) if not path.startswith(f"{folder}/")} == set()
    assert listeners(processes[1:]) == expected


async def test_over_tcp_each_side_listens_on_one_port_of_loopback() -> None:
    before = listeners(family())
    with guarded_core() as core:
        async with core.connect(core.make_key("alice")) as engine:
            await complete(engine)
            found = listeners(family()) - before
            port = core.address.rpartition(":")[2]
            assert f"tcp 127.0.0.1:{port}" in found
            (client,) = found - {f"tcp 127.0.0.1:{port}"}
            assert re.fullmatch(r"tcp 127\.0\.0\.1:\d+", client)


def test_the_test_would_see_a_listener() -> None:
    import socket

    before = listeners([os.getpid()])
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)),
        socket.create_server(("0.0.0.0", 0)) as everywhere,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        datagrams.bind(("127.0.0.1", 0))
        abstract.bind("\0footplate-test-" + str(os.getpid()))
        abstract.listen()
        assert listeners([os.getpid()]) - before == {
            f"tcp 127.0.0.1:{port}",
            f"tcp 0.0.0.0:{everywhere.getsockname()[1]}",
            f"udp 127.0.0.1:{datagrams.getsockname()[1]}",
            f"@footplate-test-{os.getpid()}",
        }
