"""A core goes and another comes: what the client says to it, and what its streams see."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from footplate.frontend import AsyncLLMEngine, Restart, SamplingParams
from footplate.frontend.health import Health
from footplate.frontend.recovery import Recovery
from footplate.protocol import codec
from footplate.protocol.errors import (
    EngineDeadError,
    EngineNotReadyError,
    RequestFailedError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ControlReply,
    EngineFailed,
    FinishReason,
    GetStats,
    Stats,
    StepOutputs,
)

from .scripted_core import EPOCH, PATIENCE_S, WELCOME, ScriptedCore

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

PROMPT = [20, 21]
STATS = Stats(*range(11))
NEXT = EPOCH + 1


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine.sock"


@pytest.fixture
def core(address: str) -> Iterator[ScriptedCore]:
    with ScriptedCore.at(address) as core:
        yield core


@asynccontextmanager
async def attached(core: ScriptedCore, **arguments: Any) -> AsyncIterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S, **arguments)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    try:
        yield engine
    finally:
        engine.shutdown()


@asynccontextmanager
async def succeeded(core: ScriptedCore, **welcome: Any) -> AsyncIterator[ScriptedCore]:
    """The core vanishes, and another that is ready takes its address."""
    core.close()
    with ScriptedCore.at(core.address) as other:
        await other.accept(replace(WELCOME, **{"epoch": NEXT, **welcome}))
        yield other


def tokens(**params: Any) -> SamplingParams:
    return SamplingParams(detokenize=False, **params)


async def ask(engine: AsyncLLMEngine, core: ScriptedCore, **params: Any) -> tuple[Any, AddRequest]:
    stream = await engine.add_request(None, PROMPT, tokens(**params))
    return stream, await core.hear_request()


async def next_tokens(stream: Any) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return (await anext(stream)).outputs[0].token_ids  # type: ignore[no-any-return]


async def loss_of(engine: AsyncLLMEngine) -> None:
    """Give the event loop turns until the engine has noticed."""
    async with asyncio.timeout(PATIENCE_S):
        while engine.is_running:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    "death", ["it says so", "it vanishes", "it dismisses us", "it makes no sense"]
)
async def test_whatever_ends_a_core_its_streams_and_calls_go_on_in_the_next(
    core: ScriptedCore, death: str
) -> None:
    told: list[Restart] = []
    async with attached(core, on_restart=told.append) as engine:
        begun, first = await ask(engine, core, seed=7)
        fresh, second = await ask(engine, core, max_tokens=9)
        await core.push_tokens(first.handle, 0, 5, 6)
        assert await next_tokens(begun) == [5, 6]
        calling = asyncio.create_task(engine.get_stats())
        call = await core.hear()
        assert isinstance(call, GetStats)
        match death:
            case "it says so":
                words = "RuntimeError: out of memory"
                await core.push(EngineFailed(words))
            case "it vanishes":
                words = "the engine core closed the connection"
                core.close()
                core = ScriptedCore(core.address)
            case "it makes no sense":
                words = "outputs that make no sense"
                await core.push(StepOutputs(EPOCH, [98, 99], [2], [7, 8]))
            case _:
                words = "too much left unread"
                await core.dismiss(words)
        # Without a Goodbye: what the core keeps of this session is not to go.
        await core.accept(replace(WELCOME, epoch=NEXT))
        again, anew = await core.hear_request(), await core.hear_request()
        assert (
            again == replace(first, prior_token_ids=[5, 6], is_replay=True, age_s=again.age_s)
            and again.age_s > first.age_s
        )
        assert anew == replace(second, is_replay=True, age_s=anew.age_s)
        assert await core.hear() == call
        await core.push(ControlReply(call.call, True, stats=STATS))
        assert await calling == STATS
        await core.push_tokens(first.handle, 2, 7, epoch=NEXT)
        assert await next_tokens(begun) == [5, 6, 7]
        await core.push_tokens(second.handle, 0, 8, epoch=NEXT)
        assert await next_tokens(fresh) == [8]
        assert engine.is_running and not engine.errored
        assert (engine.engine_restarts, engine.requests_replayed) == (1, 2)
        [restart] = told
        assert (restart.num_restarts, restart.num_replayed) == (1, 2)
        assert words in restart.cause
        engine.shutdown()
        core.close()


async def test_a_core_that_takes_back_whom_it_has_dismissed_is_no_other(
    core: ScriptedCore,
) -> None:
    told: list[Restart] = []
    async with attached(core, on_restart=told.append) as engine:
        for num_dismissals in (1, 2):
            stream, request = await ask(engine, core)
            await core.push_tokens(request.handle, 0, 5, 6)
            await core.dismiss("too much left unread")
            await core.accept()
            assert (await core.hear_request()).prior_token_ids == [5, 6], "they were read first"
            await core.push_tokens(request.handle, 2, 7)
            await core.push_end(request.handle, FinishReason.STOP)
            outputs = [output.outputs[0].token_ids async for output in stream]
            assert outputs[-1] == [5, 6, 7]
            assert (engine.engine_restarts, engine.requests_replayed) == (0, num_dismissals)
    assert not told


async def test_a_client_that_is_dismissed_before_it_is_told_anything_does_not_come_back_for_ever(
    core: ScriptedCore,
) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5)
        await core.dismiss("its output cannot be sent")
        await core.accept()
        await core.hear_request()
        await core.dismiss("its output cannot be sent")
        with pytest.raises(EngineDeadError, match="cannot be sent, before any output had come"):
            while True:
                await next_tokens(stream)
        assert engine.errored


async def test_what_the_old_core_said_last_is_neither_lost_nor_doubled(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5)
        assert await next_tokens(stream) == [5]
        async with succeeded(core) as other:
            again = await other.hear_request()
            assert again.prior_token_ids == [5]
            # It counts from where the client says; what came before is known already.
            await other.push_tokens(request.handle, 0, 5, 6, epoch=NEXT)
            assert await next_tokens(stream) == [5, 6]


async def test_each_completion_goes_on_by_itself_once_one_of_them_has_begun(
    core: ScriptedCore,
) -> None:
    async with attached(core) as engine:
        _, request = await ask(engine, core, n=3, seed=40)
        handle = request.handle
        await core.push_tokens(handle, 0, 5)
        await core.push_tokens(handle + 2, 0, 6, 7)
        await core.push_end(handle, FinishReason.STOP)
        calling = asyncio.create_task(engine.get_stats())
        await core.hear()  # by now all that was pushed before may still be under way
        await core.push(ControlReply(1, True, stats=STATS))
        await calling
        async with succeeded(core) as other:
            second, third = await other.hear_request(), await other.hear_request()
            assert [(r.handle, r.n, r.params.seed) for r in (second, third)] == [
                (handle + 1, 1, 41),
                (handle + 2, 1, 42),
            ]
            assert (second.prior_token_ids, third.prior_token_ids) == ([], [6, 7])


async def test_what_was_aborted_meanwhile_is_not_replayed_and_what_was_added_is(
    core: ScriptedCore,
) -> None:
    async with attached(core) as engine:
        left, _ = await ask(engine, core)
        core.close()
        await loss_of(engine)
        with pytest.raises(EngineNotReadyError, match="being replaced"):
            await engine.check_health()
        health = await engine.health()
        assert (health.state, health.is_alive, health.is_ready) == ("restarting", False, False)
        left.close()
        added = await engine.add_request("late", PROMPT, tokens())
        with ScriptedCore.at(core.address) as other:
            await other.accept(replace(WELCOME, epoch=NEXT))
            request = await other.hear_request()
            assert request.handle == added.handle
            await engine.abort("late")
            assert await other.hear() == AbortRequests([added.handle])


async def test_whoever_asks_how_it_is_while_its_core_goes_is_told(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        asking = [asyncio.create_task(engine.health()), asyncio.create_task(engine.check_health())]
        await asyncio.sleep(0)  # both wait for an answer now
        core.close()
        health, check = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(health, Health)
        assert (health.state, health.is_alive, health.is_ready) == ("restarting", False, False)
        assert isinstance(check, EngineNotReadyError)


async def test_streams_end_when_somebody_ends_all_tasks_and_so_the_recovery(
    core: ScriptedCore,
) -> None:
    async with attached(core) as engine:
        stream, _ = await ask(engine, core)
        core.close()
        await loss_of(engine)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        with pytest.raises(EngineDeadError, match="was cancelled"):
            await next_tokens(stream)
        assert engine.errored


async def test_streams_end_when_the_recovery_itself_fails(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> list[AddRequest]:
        raise RuntimeError("not my day")

    async with attached(core) as engine:
        stream, _ = await ask(engine, core)
        monkeypatch.setattr(Recovery, "welcome", fail)
        async with succeeded(core):
            with pytest.raises(EngineDeadError, match="not my day"):
                await next_tokens(stream)


async def test_a_shutdown_ends_streams_that_wait_for_the_next_core(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, _ = await ask(engine, core)
        core.close()
        await loss_of(engine)
        engine.shutdown()
        with pytest.raises(Exception, match="shut down"):
            await next_tokens(stream)


async def test_an_engine_that_does_not_come_back_in_time_is_dead(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=0.2)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    stream, _ = await ask(engine, core)
    core.close()
    with pytest.raises(EngineDeadError, match="nothing took its place within"):
        await next_tokens(stream)
    assert engine.errored
    engine.shutdown()


async def test_an_engine_that_comes_back_with_another_model_is_dead(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, _ = await ask(engine, core)
        async with succeeded(core, model=replace(WELCOME.model, vocab_size=77)):
            with pytest.raises(EngineDeadError, match="vocab_size was 1000, is 77"):
                await next_tokens(stream)


async def test_suspects_are_run_alone_and_one_that_was_alone_in_a_fatal_step_is_not_run_again(
    core: ScriptedCore,
) -> None:
    async with attached(core) as engine:
        poison, first = await ask(engine, core)
        _, second = await ask(engine, core)
        _, third = await ask(engine, core)
        suspects = [first.handle, second.handle]
        crashed = {"has_crashed": True, "num_suspects": 2}
        async with succeeded(core, suspects=suspects, **crashed) as other:
            heard = [await other.hear_request() for _ in range(3)]
            assert [request.run_alone for request in heard] == [True, True, False]
            crashed["num_suspects"] = 1
            async with succeeded(other, suspects=[first.handle], epoch=77, **crashed) as last:
                heard = [await last.hear_request() for _ in range(2)]
                assert [(r.handle, r.run_alone) for r in heard] == [
                    (second.handle, False),
                    (third.handle, False),
                ]
                with pytest.raises(RequestFailedError, match="in which it took part alone"):
                    await next_tokens(poison)


async def test_a_callback_that_raises_does_no_harm(
    core: ScriptedCore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(restart: Restart) -> None:
        raise ValueError("not my day")

    async with attached(core, on_restart=fail) as engine:
        stream, request = await ask(engine, core)
        async with succeeded(core) as other:
            await other.hear_request()
            await other.push_tokens(request.handle, 0, 5, epoch=NEXT)
            assert await next_tokens(stream) == [5]
    assert "not my day" in caplog.text


async def test_a_request_that_is_too_large_to_be_sent_again_ends_alone_with_its_siblings(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attached(core) as engine:
        large, first = await ask(engine, core, n=3, max_tokens=None)
        small, second = await ask(engine, core)
        handle = first.handle
        for index in range(2):
            await core.push_tokens(handle + index, 0, *range(500, 800))
            await next_tokens(large)
        monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 600)
        async with succeeded(core) as other:
            again = await other.hear_request()
            assert again.handle == second.handle, "of the large one nothing is sent"
            await other.push_tokens(second.handle, 0, 5, epoch=NEXT)
            assert await next_tokens(small) == [5]
            with pytest.raises(RequestFailedError, match="the limit is 600"):
                while True:
                    await next_tokens(large)
