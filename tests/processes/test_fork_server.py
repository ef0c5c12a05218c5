"""Real fork servers: that cores come from them, and that an engine outlives each of them."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.fork_server import ForkServer

from .conftest import HERE, PATIENCE_S, StartCore, in_time, is_gone
from .test_recovery import PATIENT, core_after, progress_of, under_load


def server_of(engine: AsyncLLMEngine) -> int:
    server = psutil.Process(engine.process_id).parent()
    assert server is not None
    assert server.ppid() == os.getpid()
    return int(server.pid)


async def test_every_core_of_an_engine_is_a_fork_of_one_process_which_uses_no_cpu() -> None:
    async with AsyncLLMEngine(PATIENT) as engine:
        first = engine.process_id
        assert first is not None
        server = psutil.Process(server_of(engine))
        used = server.cpu_times()
        async with under_load(engine):
            os.kill(first, signal.SIGKILL)
            second = await core_after(engine, first)
        assert server_of(engine) == server.pid
        assert is_gone(first)
        assert psutil.Process(second).name() in ("footplate-core", server.name())
        assert server.cpu_times().user - used.user < 0.5
    assert is_gone(server.pid)


async def test_the_death_of_the_server_is_no_news_until_a_core_is_needed() -> None:
    async with AsyncLLMEngine(PATIENT) as engine:
        core, server = engine.process_id, server_of(engine)
        assert core is not None
        async with under_load(engine):
            os.kill(server, signal.SIGKILL)
            await progress_of(engine)
            assert engine.process_id == core
            os.kill(core, signal.SIGKILL)
            await core_after(engine, core)
        assert server_of(engine) != server


async def test_core_and_server_may_be_killed_together() -> None:
    async with AsyncLLMEngine(PATIENT) as engine:
        core, server = engine.process_id, server_of(engine)
        assert core is not None
        async with under_load(engine):
            os.kill(server, signal.SIGKILL)
            os.kill(core, signal.SIGKILL)
            await core_after(engine, core)


async def test_a_server_that_is_stopped_is_replaced_when_a_core_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for timeout in ("supervisor.FORK_TIMEOUT_S", "fork_server.STATUS_TIMEOUT_S"):
        monkeypatch.setattr(f"footplate.frontend.{timeout}", 0.3)
    async with AsyncLLMEngine(PATIENT) as engine:
        core, server = engine.process_id, server_of(engine)
        assert core is not None
        async with under_load(engine):
            os.kill(server, signal.SIGSTOP)
            os.kill(core, signal.SIGKILL)
            await core_after(engine, core)
        assert is_gone(server)


async def test_a_server_that_is_stopped_does_not_keep_an_engine_from_ending() -> None:
    async with AsyncLLMEngine(PATIENT) as engine:
        core, server = engine.process_id, server_of(engine)
        assert core is not None
        os.kill(server, signal.SIGSTOP)
    assert is_gone(server)
    assert await asyncio.to_thread(in_time, lambda: is_gone(core))


async def test_a_server_that_cannot_be_started_ends_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = folder / "program"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    engine = AsyncLLMEngine(EngineArgs(model="fake"))
    with pytest.raises(Exception, match="exit status 7"):
        await asyncio.wait_for(engine.start(), PATIENCE_S)


def test_where_an_import_has_started_a_thread_cores_import_for_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = folder / "program"
    # As a fork server it has a thread; as what that executes instead of forking, it is a core.
    program.write_text(
        f'#!/bin/sh\ncase "$2" in\n*backend) exec {sys.executable} {HERE}/threaded.py ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    private = folder / "core"
    private.mkdir(mode=0o700)
    address = f"ipc://{private}/engine.sock"
    process = CoreProcess(EngineArgs(model="fake").core_config(address), lambda error: None)
    try:
        assert in_time((private / "engine.sock").exists)
        assert psutil.Process(process.process_id).cmdline()[-1] == "footplate.backend.main"
    finally:
        process.stop()
    assert "threads" in capfd.readouterr().err


async def test_a_core_has_this_projects_variables_as_they_are_when_it_is_made(
    start_core: StartCore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = start_core().config  # its folder is a private one
    server = ForkServer(config)
    monkeypatch.setenv("FOOTPLATE_FAIL_POINTS", "start.begun:exit=42")
    ends: list[object] = []
    core = CoreProcess(config, ends.append, fork_server=server)
    assert in_time(lambda: core.exit_status == 42)
    monkeypatch.delenv("FOOTPLATE_FAIL_POINTS")
    core = CoreProcess(config, ends.append, fork_server=server)
    # The address is another core's, and that is what it says.
    assert in_time(lambda: core.exit_status == os.EX_CONFIG)
    server.stop()
