"""Real cores that die, hang, stop and are replaced, and streams that go on exactly."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from footplate.frontend import (
    AsyncLLMEngine,
    EngineArgs,
    Restart,
    SamplingParams,
    succession,
    supervisor,
)
from footplate.frontend.connection import Connection
from footplate.frontend.core_link import CoreLink
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
)
from footplate.protocol.messages import Welcome

from .conftest import PATIENCE_S, Program, in_time, is_gone
from .test_launch import launch, wait_until_ready

LENGTH = 3_000
PATIENT = EngineArgs(model="fake", max_restarts=100)


def params(index: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=LENGTH,
        temperature=float(index % 2),
        seed=index,
        n=1 + index % 3,
        detokenize=False,
    )


async def tokens_of(engine: AsyncLLMEngine, index: int) -> dict[int, list[int]]:
    """All completions of one request."""
    tokens: dict[int, list[int]] = {}
    async for output in engine.generate([20 + index] * 20, params(index)):
        for completion in output.outputs:
            tokens[completion.index] = list(completion.token_ids)
    return tokens


@asynccontextmanager
async def under_load(engine: AsyncLLMEngine) -> AsyncIterator[None]:
    """Twelve requests, 24 completions, run once undisturbed and once around what is done in the
    body; afterwards they must be equal."""
    expected = await asyncio.gather(*(tokens_of(engine, index) for index in range(12)))
    tasks = [asyncio.create_task(tokens_of(engine, index)) for index in range(12)]
    await progress_of(engine)
    yield
    async with asyncio.timeout(6 * PATIENCE_S):
        assert await asyncio.gather(*tasks) == expected
    stats = await engine.get_stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


async def progress_of(engine: AsyncLLMEngine) -> None:
    """Wait until every suspect has had its turn: others come after them."""
    async for _ in engine.generate([7], SamplingParams(max_tokens=1, detokenize=False)):
        pass


async def core_after(engine: AsyncLLMEngine, process_id: int) -> int:
    """The pid of the core that took this one's place."""
    async with asyncio.timeout(PATIENCE_S):
        while not engine.is_running or engine.process_id == process_id:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert engine.process_id is not None
    return engine.process_id


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_core_may_be_killed_again_and_again(number: signal.Signals) -> None:
    restarts: list[Restart] = []
    engine = AsyncLLMEngine.from_engine_args(PATIENT, on_restart=restarts.append)
    async with engine, under_load(engine):
        for _ in range(3):
            core = engine.process_id
            assert core is not None
            os.kill(core, number)
            await core_after(engine, core)
            assert is_gone(core)
            await progress_of(engine)
    assert engine.engine_restarts == len(restarts) == 3
    assert all(restart.num_replayed for restart in restarts)
    assert number is signal.SIGTERM or all(number.name in restart.cause for restart in restarts)


async def test_a_core_that_is_stopped_goes_on_when_it_is_continued() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        assert engine.process_id is not None
        core = psutil.Process(engine.process_id)
        core.suspend()
        # Its threads stop one by one, a moment later.
        assert await asyncio.to_thread(in_time, lambda: core.status() == psutil.STATUS_STOPPED)
        health = await engine.health()
        assert (health.state, health.is_alive, health.is_ready) == ("serving", False, False)
        with pytest.raises(EngineError, match="does not answer"):
            await engine.check_health()
        os.kill(engine.process_id, signal.SIGCONT)
        async with asyncio.timeout(PATIENCE_S):
            while not (await engine.health()).is_ready:
                pass
        await engine.check_health()
    assert engine.engine_restarts == 0


async def test_a_core_that_stays_stopped_is_ended_and_replaced(
    capfd: pytest.CaptureFixture[str],
) -> None:
    args = EngineArgs(model="fake", stall_timeout_s=0.6, hang_timeout_s=1.2)
    restarts: list[Restart] = []
    engine = AsyncLLMEngine.from_engine_args(args, on_restart=restarts.append)
    async with engine, under_load(engine):
        core = engine.process_id
        assert core is not None
        os.kill(core, signal.SIGSTOP)
        await core_after(engine, core)
    assert [restart.cause for restart in restarts] == [
        "the engine core was ended because it had not got any further for 1.2 s"
    ]


async def test_nobody_takes_leave_of_a_core_that_is_gone() -> None:
    """The event loop would wait for a Goodbye that nobody hears."""
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine:
        core = engine.process_id
        assert core is not None
        closed: list[bool] = []
        close = Connection.close

        def note(connection: Connection, *, takes_leave: bool = True, **others: bool) -> None:
            closed.append(takes_leave)
            close(connection, takes_leave=takes_leave, **others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "close", note)
            os.kill(core, signal.SIGKILL)
            await core_after(engine, core)
        assert closed == [False]


async def test_an_idle_engine_whose_core_dies_serves_the_next_request() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine:
        core = engine.process_id
        assert core is not None
        os.kill(core, signal.SIGKILL)
        assert await tokens_of(engine, 0)
        assert engine.engine_restarts == 1


async def test_more_deaths_than_the_budget_allows_end_the_engine_with_their_cause() -> None:
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model="fake", max_restarts=2)) as engine:
        stream = await engine.add_request(
            None, [20], SamplingParams(max_tokens=30_000, detokenize=False)
        )
        core = engine.process_id
        assert core is not None
        for _ in range(2):
            os.kill(core, signal.SIGKILL)
            core = await core_after(engine, core)
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"SIGKILL.* replaced 2 times within 60 s"):
            async for _ in stream:
                pass
        assert engine.errored


async def test_clients_of_a_launched_engine_go_on_when_its_core_is_killed(
    run: Callable[..., Program], folder: object
) -> None:
    address = f"ipc://{folder}/engine.sock"
    program = launch(run, address)
    core = wait_until_ready(program)
    async with (
        AsyncLLMEngine.connect(address) as one,
        AsyncLLMEngine.connect(address) as other,
        under_load(one),
        under_load(other),
    ):
        os.kill(core, signal.SIGKILL)
        await core_after(one, core)
        assert "SIGKILL" in await asyncio.to_thread(program.line_with, "core replaced in")
        assert await core_after(other, core) == one.process_id


# ---- a core that ends the connection and lives

HASTY = EngineArgs(model="fake", max_unread_bytes=2**18, max_unread_tokens=None)


async def leave_unread(engine: AsyncLLMEngine, capfd: pytest.CaptureFixture[str]) -> None:
    """Block the event loop, as an application may, until the core has had enough of it."""
    capfd.readouterr()
    stream = await engine.add_request(
        None, [20], SamplingParams(max_tokens=30_000, detokenize=False, ignore_eos=True)
    )
    assert in_time(lambda: "bytes unread: dropped" in capfd.readouterr().err)
    stream.close()


async def test_an_application_that_was_blocked_goes_on_in_the_core_that_has_dismissed_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    restarts: list[Restart] = []
    engine = AsyncLLMEngine.from_engine_args(HASTY, on_restart=restarts.append)
    async with engine, under_load(engine):
        core = engine.process_id
        for num_dismissals in (1, 2):
            before = engine.requests_replayed
            await leave_unread(engine, capfd)
            async with asyncio.timeout(PATIENCE_S):
                while engine.requests_replayed == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            await progress_of(engine)
            assert engine.is_running and engine.process_id == core, num_dismissals
    assert engine.engine_restarts == 0 and not restarts


@pytest.mark.parametrize(
    ("number", "patience_s", "words"),
    [
        (signal.SIGSTOP, 0.2, "no engine on .* was ready within 0.2 s"),
        (signal.SIGKILL, 10 * PATIENCE_S, "the engine core was killed by SIGKILL"),
    ],
)
async def test_a_core_that_does_not_take_back_whom_it_has_dismissed_is_replaced(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    patience_s: float,
    words: str,
) -> None:
    restarts: list[Restart] = []
    engine = AsyncLLMEngine.from_engine_args(HASTY, on_restart=restarts.append)
    async with engine, under_load(engine):
        core, connect = psutil.Process(engine.process_id), CoreLink.connect

        async def connect_to_no_use(link: CoreLink, timeout_s: float) -> Welcome:
            monkeypatch.setattr(CoreLink, "connect", connect)
            core.suspend()
            assert in_time(lambda: core.status() == psutil.STATUS_STOPPED)
            core.send_signal(number)
            return await connect(link, timeout_s)

        monkeypatch.setattr(succession, "TAKE_BACK_S", patience_s)
        monkeypatch.setattr(CoreLink, "connect", connect_to_no_use)
        await leave_unread(engine, capfd)
        await core_after(engine, core.pid)
        assert is_gone(core.pid)
    [restart] = restarts
    assert re.search(f"unread, and the engine core did not take .*: {words}", restart.cause)


# ---- replacing it on purpose


async def test_a_core_can_be_replaced_under_load() -> None:
    args = EngineArgs(model="fake", weights_version="one")
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        before = engine.process_id
        stream = await engine.add_request(
            None, [20], SamplingParams(max_tokens=30_000, detokenize=False)
        )
        assert (await anext(stream)).outputs[0].weights_versions == ((0, "one"),)
        await engine.replace_core(EngineArgs(model="fake", weights_version="two", max_num_seqs=7))
        assert engine.process_id != before and before is not None and is_gone(before)
        assert (await engine.get_scheduler_config()).max_num_seqs == 7
        [at_first, (position, version)] = (await anext(stream)).outputs[0].weights_versions
        assert at_first == (0, "one") and position > 0 and version == "two"
        stream.close()
        async for output in engine.generate([1], SamplingParams(max_tokens=1, detokenize=False)):
            assert output.outputs[0].weights_versions == ((0, "two"),)
        assert engine.engine_restarts == 0
        # Its successor is looked after like the first.
        second = engine.process_id
        assert second is not None
        os.kill(second, signal.SIGKILL)
        await core_after(engine, second)
        assert (await engine.get_scheduler_config()).max_num_seqs == 7


async def test_streams_are_the_same_when_the_weights_are() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        await engine.replace_core(PATIENT)


async def test_a_successor_that_cannot_start_or_is_another_model_changes_nothing() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        before = engine.process_id
        with pytest.raises(EngineStartError, match="does not fit"):
            await engine.replace_core(
                EngineArgs(model="fake", max_model_len=99, num_gpu_blocks_override=1)
            )
        with pytest.raises(EngineError, match="must be 'Fake'"):
            await engine.replace_core(EngineArgs(model="demo"))
        assert engine.process_id == before


async def when_taken_over(engine: AsyncLLMEngine) -> None:
    """The new core is ready, and the streams have not moved yet."""
    async with asyncio.timeout(PATIENCE_S):
        while engine.is_running:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_successor_that_dies_when_it_takes_over_is_replaced_like_any_other() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        before = engine.process_id
        replacing = asyncio.create_task(engine.replace_core(PATIENT))
        await when_taken_over(engine)
        successor = engine.process_id
        assert successor is not None and successor != before
        os.kill(successor, signal.SIGKILL)
        await replacing
        await core_after(engine, successor)
        await progress_of(engine)
        assert engine.engine_restarts == 1


async def test_streams_move_even_if_whoever_replaced_their_core_waits_no_longer() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        before = engine.process_id
        assert before is not None
        replacing = asyncio.create_task(engine.replace_core(PATIENT))
        await when_taken_over(engine)
        replacing.cancel()
        await core_after(engine, before)
        assert await asyncio.to_thread(in_time, lambda: is_gone(before))


async def test_a_shutdown_in_the_middle_of_a_replacement_is_said_to_be_one() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine:
        replacing = asyncio.create_task(engine.replace_core(PATIENT))
        await when_taken_over(engine)
        successor = engine.process_id
        engine.shutdown()
        with pytest.raises(EngineClosedError):
            await replacing
        assert successor is not None and is_gone(successor)


async def test_two_replacements_at_once_come_one_after_the_other() -> None:
    async with AsyncLLMEngine.from_engine_args(PATIENT) as engine, under_load(engine):
        await asyncio.gather(engine.replace_core(PATIENT), engine.replace_core(PATIENT))
        assert engine.is_running and engine.engine_restarts == 0


def test_an_engine_can_be_shut_down_behind_a_loop_that_was_closed_during_its_recovery() -> None:
    async def lose_core() -> None:
        await engine.start()
        assert engine.process_id is not None
        os.kill(engine.process_id, signal.SIGKILL)
        await when_taken_over(engine)

    engine, loop = AsyncLLMEngine.from_engine_args(PATIENT), asyncio.new_event_loop()
    loop.run_until_complete(lose_core())
    [recovery] = asyncio.all_tasks(loop)
    loop.close()
    engine.shutdown()
    assert engine.is_stopped
    recovery._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_a_spare_that_cannot_be_started_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnlyTheFirst(CoreProcess):
        def __init__(self, config: CoreConfig, *args: Any, **kwargs: Any) -> None:
            if config.is_standby:
                raise BlockingIOError("Resource temporarily unavailable")
            super().__init__(config, *args, **kwargs)

    monkeypatch.setattr(supervisor, "CoreProcess", OnlyTheFirst)
    args = EngineArgs(model="fake", standby=True)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        assert "no spare engine core can be started: Resource" in caplog.text
        assert await tokens_of(engine, 0)


async def test_a_spare_that_dies_is_followed_by_another_while_the_budget_lasts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = EngineArgs(model="fake", standby=True, max_restarts=2)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        core = engine.process_id
        server = psutil.Process(core).parent()
        assert server is not None

        def spares() -> list[int]:
            return [child.pid for child in server.children() if child.pid != core]

        gone: list[int] = []
        for _ in range(3):
            assert await asyncio.to_thread(in_time, lambda: set(spares()) - set(gone))
            (spare,) = set(spares()) - set(gone)
            gone.append(spare)
            os.kill(spare, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while "no other spare is started" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert engine.process_id == core
        assert caplog.text.count("the spare engine core has ended") == 3


async def test_the_memory_that_cores_share_goes_with_a_shutdown() -> None:
    engine = AsyncLLMEngine.from_engine_args(EngineArgs(model="fake", standby=True))
    for _ in range(2):
        await engine.start()
        assert num_shared_memories() == 1
        engine.shutdown()
        assert num_shared_memories() == 0


def num_shared_memories() -> int:
    """That this process holds on to."""
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum("footplate-weights" in os.readlink(link) for link in links if link.is_symlink())


async def test_somebody_elses_core_is_not_replaced(
    run: Callable[..., Program], folder: object
) -> None:
    address = f"ipc://{folder}/engine.sock"
    wait_until_ready(launch(run, address))
    async with AsyncLLMEngine.connect(address) as engine:
        with pytest.raises(EngineError, match="a core of its own"):
            await engine.replace_core(PATIENT)
