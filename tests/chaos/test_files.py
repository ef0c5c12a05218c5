"""What is in the way, or full (F28 to F31). More of what may lie at an address:
`tests/processes/test_launch.py`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.errors import AddressInUseError, EngineStartError

from .conftest import PATIENCE_S, Ledger, all_exact, exact, in_time

EX_CONFIG = 78


def start(address: str, ends: list[EngineStartError], **args: Any) -> CoreProcess:
    given = EngineArgs(log_level="ERROR", **{"model": "fake", **args})
    return CoreProcess(given.core_config(address), ends.append)


async def test_an_address_that_a_core_holds_is_refused_to_another_before_it_loads(
    ledger: Ledger, folder: Path
) -> None:
    address = f"ipc://{folder}/engine.sock"
    ends: list[EngineStartError] = []
    first = start(address, ends)
    try:
        async with AsyncLLMEngine.connect(address) as engine:
            late: list[EngineStartError] = []
            second = start(address, late, model="/nowhere")
            assert await asyncio.to_thread(in_time, lambda: late)
            assert isinstance(late[0], AddressInUseError)
            assert f"process {first.process_id}" in str(late[0])
            assert second.exit_status == EX_CONFIG
            second.stop()
            await all_exact(engine, 4)
    finally:
        first.stop()
    assert not ends and os.listdir(folder) == []


async def test_a_port_that_is_in_use_is_refused_with_the_name_of_who_has_it(
    ledger: Ledger,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends: list[EngineStartError] = []
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        process = start(address, ends, model="/nowhere", insecure_tcp=True)
        assert await asyncio.to_thread(in_time, lambda: ends)
        process.stop()
    assert isinstance(ends[0], AddressInUseError) and f"process {os.getpid()}" in str(ends[0])
    assert process.exit_status == EX_CONFIG


@pytest.mark.chaos
async def test_what_a_killed_core_has_left_is_no_obstacle_to_the_next(
    ledger: Ledger, folder: Path
) -> None:
    address = f"ipc://{folder}/engine.sock"
    ends: list[EngineStartError] = []
    for _ in range(3):
        process = start(address, ends)
        async with AsyncLLMEngine.connect(address) as engine:
            await exact(engine, 1)
        os.kill(process.process_id, signal.SIGKILL)
        assert await asyncio.to_thread(in_time, lambda: ends)
        process.stop()
        assert "engine.sock" in os.listdir(folder)
        ends.clear()
    last = start(address, ends)
    async with AsyncLLMEngine.connect(address) as engine:
        await exact(engine, 1)
    last.stop()
    assert not ends and os.listdir(folder) == []


PROGRAM = """
import asyncio, logging, os, signal
from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams

async def main():
    args = EngineArgs(model="fake", log_level="DEBUG")
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        for _ in range(2):
            params = SamplingParams(max_tokens=20, detokenize=False)
            outputs = [output async for output in engine.generate([20], params)]
            print(len(outputs[-1].outputs[0].token_ids), engine.engine_restarts, flush=True)
            os.kill(engine.process_id, signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_log_that_cannot_be_written_costs_no_token() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.stdout.split() == ["20", "0", "20", "1"]


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of a few kilobytes."""
    small = folder / "small"
    small.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only a superuser may mount")
    yield small
    subprocess.run(["umount", str(small)], check=True)


@pytest.mark.chaos
async def test_a_disk_without_room_costs_no_token(ledger: Ledger, small_disk: Path) -> None:
    """The folder of the sockets, where a core notes who takes part in its steps."""
    ends: list[EngineStartError] = []
    process = start(f"ipc://{small_disk}/engine.sock", ends)
    async with AsyncLLMEngine.connect(f"ipc://{small_disk}/engine.sock") as engine:
        with pytest.raises(OSError, match="No space"):
            (small_disk / "full").write_bytes(bytes(2**20))
        await all_exact(engine, 8)
    process.stop()
    assert not ends
    assert os.listdir(small_disk) == ["full"]


async def test_a_disk_that_is_full_already_is_why_a_core_does_not_start(
    ledger: Ledger, small_disk: Path
) -> None:
    with pytest.raises(OSError, match="No space"):
        (small_disk / "full").write_bytes(bytes(2**20))
    ends: list[EngineStartError] = []
    process = start(f"ipc://{small_disk}/engine.sock", ends)
    assert await asyncio.to_thread(in_time, lambda: ends)
    process.stop()
    assert "No space left" in str(ends[0])
