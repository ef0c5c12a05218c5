"""Ends that somebody wanted (F32 to F36): on time, with an end for every stream, and nothing
left."""

import asyncio
import gc
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestStream, SamplingParams
from footplate.protocol.errors import EngineClosedError, FootplateError

from .conftest import PATIENCE_S, Ledger, in_time

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
LAUNCH = ("-m", "footplate.frontend.launch", "--model", "fake", "--log-level", "ERROR")
START_S = 1.0
SLOW_STEPS = "runner.execute:sleep=0.005"


async def last_reason(stream: RequestStream) -> str | None:
    return [output async for output in stream][-1].outputs[0].finish_reason


async def launch(folder: Path, *arguments: str) -> tuple[asyncio.subprocess.Process, str]:
    address = f"ipc://{folder}/engine.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *LAUNCH, "--address", address, *arguments),
        stderr=asyncio.subprocess.DEVNULL,
    )
    return process, address


async def test_a_signal_lets_streams_finish_until_the_deadline_and_ends_the_others(
    ledger: Ledger, folder: Path
) -> None:
    ledger.fail(SLOW_STEPS)
    process, address = await launch(folder, "--drain-timeout-s", "0.5")
    ledger.fail("")
    async with AsyncLLMEngine.connect(address) as engine:
        streams = [await engine.add_request(None, [20 + n], FOREVER) for n in range(32)]
        for stream in streams:
            await anext(stream)
        process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        reasons = await asyncio.gather(*map(last_reason, streams))
        assert set(reasons) == {"abort"}
        with pytest.raises(FootplateError):  # at the door, or right behind it
            await last_reason(await engine.add_request(None, [20], FOREVER))
        assert await process.wait() == 0
        assert time.monotonic() - since < 0.5 + 2.0
    assert os.listdir(folder) == []


@pytest.mark.chaos
async def test_a_second_signal_ends_streams_at_once(ledger: Ledger, folder: Path) -> None:
    ledger.fail(SLOW_STEPS)
    process, address = await launch(folder, "--drain-timeout-s", "60")
    ledger.fail("")
    async with AsyncLLMEngine.connect(address) as engine:
        stream = await engine.add_request(None, [20], FOREVER)
        await anext(stream)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.returncode is None, "it waits for its stream"
        process.send_signal(signal.SIGTERM)
        since = time.monotonic()
        assert await last_reason(stream) == "abort"
        assert await process.wait() == 0
        assert time.monotonic() - since < 2.0
    assert os.listdir(folder) == []


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.chaos)])
def test_a_signal_at_any_moment_of_a_start_ends_all_processes_in_time(
    folder: Path, count: int
) -> None:
    dice = Random(count)
    for _ in range(count):
        address = f"ipc://{folder}/engine.sock"
        process = subprocess.Popen(
            [sys.executable, *LAUNCH, "--address", address], stderr=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(0.0, START_S))  # the moment is what is tested
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(2.0)
        assert not psutil.wait_procs(children, timeout=2.0)[1]
        assert in_time(lambda: os.listdir(folder) == [], 2.0), os.listdir(folder)


def test_an_interrupt_from_a_terminal_reaches_all_and_ends_all(folder: Path) -> None:
    process_id, terminal = pty.fork()
    if process_id == 0:
        arguments = [sys.executable, *LAUNCH, "--address", f"ipc://{folder}/engine.sock"]
        os.execv(sys.executable, arguments)
    try:
        said = b""
        while b"ready in" not in said:
            said += os.read(terminal, 4096)
        children = psutil.Process(process_id).children(recursive=True)
        assert len(children) == 2  # the fork server and the core
        os.write(terminal, b"\x03")
        assert in_time(lambda: os.waitpid(process_id, os.WNOHANG) == (process_id, 0), 5.0)
        assert not psutil.wait_procs(children, timeout=2.0)[1]
    finally:
        os.close(terminal)
    assert os.listdir(folder) == []


async def test_a_shutdown_ends_every_open_stream_at_once(ledger: Ledger) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake", log_level="ERROR"))
    streams = [await engine.add_request(None, [20 + n], FOREVER) for n in range(50)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.create_task(last_reason(stream)) for stream in streams]
    await asyncio.sleep(0.01)
    since = time.monotonic()
    engine.shutdown()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert time.monotonic() - since < 1.0
    assert {type(outcome) for outcome in outcomes} == {EngineClosedError}


@pytest.mark.chaos
async def test_an_engine_that_is_dropped_takes_its_core_along(ledger: Ledger) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake", log_level="ERROR"))
    await engine.start()
    assert engine.process_id is not None
    core = psutil.Process(engine.process_id)
    del engine
    gc.collect()
    await asyncio.to_thread(core.wait, PATIENCE_S)


@pytest.mark.chaos
def test_an_engine_may_outlive_its_event_loop(folder: Path) -> None:
    program = (
        "import asyncio\n"
        "from footplate.frontend import AsyncLLMEngine, EngineArgs\n"
        "engine = AsyncLLMEngine(EngineArgs(model='fake'))\n"
        "asyncio.run(engine.start())\n"
        "engine.shutdown()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where there are threads
def test_a_fork_is_told_that_the_engine_is_not_its_own(warm: None) -> None:
    async def serve_and_fork() -> int:
        async with AsyncLLMEngine(EngineArgs(model="fake", log_level="ERROR")) as engine:
            child = os.fork()
            if child == 0:
                try:
                    await engine.add_request(None, [20], FOREVER)
                except EngineClosedError as error:
                    os._exit(0 if "fork" in str(error) else 2)
                os._exit(1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            params = SamplingParams(max_tokens=3, detokenize=False)
            assert [output async for output in engine.generate([20], params)]
            return status

    assert asyncio.run(serve_and_fork()) == 0
