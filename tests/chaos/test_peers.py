"""What a client may do to a core, and to other clients (F6, F15, F16, F18 to F22, F37): cost what
it is granted, and no more. Bad frames in quantity: `tests/scripts/test_fuzz.py`."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestStream, SamplingParams
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.codec import MAX_FRAME_BYTES
from footplate.protocol.errors import DuplicateRequestError, InvalidRequestError
from footplate.protocol.messages import Stats

from .conftest import PATIENCE_S, Ledger, all_exact, exact

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
HERE = Path(__file__).parent


@asynccontextmanager
async def shared_core(
    folder: Path, rules: str, monkeypatch: pytest.MonkeyPatch, **args: object
) -> AsyncIterator[tuple[str, CoreProcess]]:
    """A core for several clients; it must be empty when they have gone, and not have ended."""
    address = f"ipc://{folder}/engine.sock"
    if rules:
        monkeypatch.setenv("FOOTPLATE_FAIL_POINTS", rules)
    given = EngineArgs(**{"model": "fake", "log_level": "ERROR", **args})  # type: ignore[arg-type]
    ends: list[Exception] = []
    process = CoreProcess(given.core_config(address), ends.append)
    monkeypatch.delenv("FOOTPLATE_FAIL_POINTS", raising=False)
    try:
        yield address, process
        async with AsyncLLMEngine.connect(address) as engine:
            limits = await engine.get_scheduler_config()
            stats = await stats_when(engine, lambda s: s.num_running + s.num_waiting == 0)
            assert stats.num_free_blocks == limits.num_kv_blocks
        assert not ends
    finally:
        process.stop()


async def stats_when(engine: AsyncLLMEngine, condition: Callable[[Stats], bool]) -> Stats:
    """The core's books, once they are as they should be."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition(stats := await engine.get_stats()):
                return stats
            await asyncio.sleep(0.002)


@asynccontextmanager
async def client_program(
    address: str, num_streams: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another client, in a process of its own, whose streams have all begun."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "client_program.py"), address, str(num_streams)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"streaming\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_client_that_is_killed_with_500_streams_leaves_nothing(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        shared_core(folder, "runner.execute:sleep=0.002", monkeypatch) as (address, _),
        AsyncLLMEngine.connect(address) as engine,
        client_program(address, 500) as victim,
    ):
        await stats_when(engine, lambda s: s.num_running + s.num_waiting == 500)
        others = asyncio.create_task(all_exact(engine, 16))
        victim.send_signal(signal.SIGKILL)
        since = time.monotonic()
        await stats_when(engine, lambda s: s.num_running + s.num_waiting <= 16)
        assert time.monotonic() - since < 2.0
        await others


@pytest.mark.chaos
async def test_a_client_that_is_stopped_costs_the_core_its_budget_and_others_nothing(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        shared_core(folder, "", monkeypatch) as (address, process),
        AsyncLLMEngine.connect(address) as engine,
        client_program(address, 200) as victim,
    ):
        before = psutil.Process(process.process_id).memory_info().rss
        victim.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        while time.monotonic() - since < 3.0:
            await all_exact(engine, 16)
        grown = psutil.Process(process.process_id).memory_info().rss - before
        # The budget counts frames; as objects, small ones take about twice their bytes.
        assert grown < 160 * 2**20
        victim.send_signal(signal.SIGCONT)


async def test_a_reader_that_sleeps_costs_nobody_else_a_token(ledger: Ledger) -> None:
    async with ledger.engine() as engine:
        asleep = await engine.add_request(None, [20], FOREVER)
        await all_exact(engine, 64)
        assert (await anext(asleep)).outputs[0].token_ids
        asleep.close()
        await stats_when(engine, lambda stats: stats.num_running + stats.num_waiting == 0)


async def test_a_message_that_is_too_large_is_refused_here_and_costs_no_other(
    ledger: Ledger,
) -> None:
    async with ledger.engine() as engine:
        others = asyncio.create_task(all_exact(engine, 8))
        with pytest.raises(InvalidRequestError):
            await exact(engine, 1, prompt=[20] * (MAX_FRAME_BYTES + 1))
        with pytest.raises(InvalidRequestError):  # the text of a grammar, not the prompt
            await exact(engine, 1, count=1, prompt=[])
        await others
    assert not ledger.restarts


@pytest.mark.chaos
async def test_equal_ids_of_one_client_are_refused_and_of_two_are_two_requests(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        shared_core(folder, "", monkeypatch) as (address, _),
        AsyncLLMEngine.connect(address) as a,
        AsyncLLMEngine.connect(address) as b,
    ):
        streams = [await engine.add_request("same", [20], FOREVER) for engine in (a, b)]
        with pytest.raises(DuplicateRequestError):
            await a.add_request("same", [20], FOREVER)
        await a.abort("same")
        assert [output async for output in streams[0]][-1].outputs[0].finish_reason == "abort"
        assert (await anext(streams[1])).outputs[0].finish_reason is None
        await b.abort("same")


async def test_aborts_of_unknown_finished_and_unsent_requests_are_no_errors(
    ledger: Ledger,
) -> None:
    async with ledger.engine() as engine:
        await engine.abort(["never", "was"])
        async for _ in engine.generate([20], SamplingParams(max_tokens=3), "over"):
            pass
        await engine.abort("over")
        # Its prompt is still being encoded, on a thread.
        adding = asyncio.create_task(engine.add_request("early", "word " * 500, FOREVER))
        await asyncio.sleep(0)
        await engine.abort("early")
        stream = await adding
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
        await all_exact(engine, 4)


@pytest.mark.chaos
async def test_ten_thousand_aborts_at_once_take_no_time(ledger: Ledger) -> None:
    async with ledger.engine("runner.execute:sleep=0.002") as engine:
        ids = [str(number) for number in range(10_000)]
        streams: list[RequestStream] = []
        for name in ids:
            streams.append(await engine.add_request(name, [20], FOREVER))
        await stats_when(engine, lambda stats: stats.num_running + stats.num_waiting == 10_000)
        since = time.monotonic()
        await engine.abort(ids)
        stats = await engine.get_stats()  # behind the abort, on the same socket
        seconds = time.monotonic() - since
        assert stats.num_running + stats.num_waiting == 0
        assert seconds < 1.0, seconds  # of both processes, on a machine that does other things too
        for stream in streams:
            stream.close()


@pytest.mark.chaos
async def test_two_clients_have_equal_shares_however_many_requests_each_has(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = "runner.execute:sleep=0.002"
    async with shared_core(folder, rules, monkeypatch, max_num_seqs=8) as (address, _):
        async with AsyncLLMEngine.connect(address) as few, AsyncLLMEngine.connect(address) as many:
            crowd = asyncio.create_task(all_exact(many, 100, count=100))
            await asyncio.sleep(0.1)
            since = time.monotonic()
            await all_exact(few, 4, count=100)
            assert not crowd.done(), "whoever came later with few requests is served before"
            took = time.monotonic() - since
            await crowd
            assert took < (time.monotonic() - since) / 2
        # And both may come back.
        async with AsyncLLMEngine.connect(address) as again:
            await all_exact(again, 4)


@pytest.mark.chaos
async def test_a_killed_application_takes_its_core_along(folder: Path) -> None:
    # F7: whoever started the core; its launcher likewise, in tests/processes/test_launch.py.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "client_program.py"), "own", "20"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"streaming\n"
    server, core = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    await process.wait()
    await asyncio.to_thread(core.wait, 2.0)
    await asyncio.to_thread(server.wait, 2.0)
