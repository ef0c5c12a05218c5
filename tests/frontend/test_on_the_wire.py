"""What the client object says to a core, and what it makes of everything a core may say."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from footplate.frontend import AsyncLLMEngine, RequestStream, SamplingParams
from footplate.frontend import connection as connection_module
from footplate.protocol.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    MessageTooLargeError,
    ProtocolMismatchError,
    RequestFailedError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ControlReply,
    EngineStopping,
    Finished,
    FinishReason,
    GetStats,
    Goodbye,
    Progress,
    Refused,
    ResetPrefixCache,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams

from .scripted_core import EPOCH, PATIENCE_S, WELCOME, ScriptedCore

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

PROMPT = [20, 21]
STATS = Stats(*range(11))


@pytest.fixture
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCore]:
    address = f"ipc://{tmp_path_factory.mktemp('link')}/engine.sock"
    with ScriptedCore.at(address) as core:
        yield core


@asynccontextmanager
async def attached(core: ScriptedCore, welcome: Any = WELCOME) -> AsyncIterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.accept(welcome)
    await starting
    try:
        yield engine
    finally:
        engine.shutdown()


def tokens(**params: Any) -> SamplingParams:
    return SamplingParams(detokenize=False, **params)


async def ask(
    engine: AsyncLLMEngine, core: ScriptedCore, request_id: str | None = None, **params: Any
) -> tuple[RequestStream, AddRequest]:
    """Send a request; the stream, and what the core heard of it."""
    stream = await engine.add_request(request_id, PROMPT, tokens(**params))
    return stream, await core.hear_request()


async def outputs_of(stream: RequestStream) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return [output async for output in stream][-1].outputs[0].token_ids


# ---- what is said


async def test_a_request_is_sent_with_everything_resolved(core: ScriptedCore) -> None:
    model = msgspec.structs.replace(WELCOME.model, eos_token_ids=(2,))
    async with attached(core, msgspec.structs.replace(WELCOME, model=model)) as engine:
        _, first = await ask(engine, core, temperature=0.5, top_k=-1, seed=5, max_tokens=None)
        assert first.prompt_token_ids == PROMPT
        assert first.params == TokenParams(0.5, 1.0, 0, 0.0, 5, 98, 0, (2,))
        stream, second = await ask(engine, core, ignore_eos=True, stop_token_ids=[7])
        assert second.params == TokenParams(1.0, 1.0, 0, 0.0, stream.seed, 16, 0, (7,))
        assert second.handle != first.handle


async def test_salt_and_priority_travel_with_the_request(core: ScriptedCore) -> None:
    limits = msgspec.structs.replace(WELCOME.limits, policy="priority")
    async with attached(core, msgspec.structs.replace(WELCOME, limits=limits)) as engine:
        prompt = {"prompt_token_ids": PROMPT, "cache_salt": "salt"}
        await engine.add_request(None, prompt, tokens(), priority=-3)
        request = await core.hear_request()
        assert (request.cache_salt, request.priority) == ("salt", -3)


async def test_aborts_of_many_requests_are_one_message(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        handles = [(await ask(engine, core, name))[1].handle for name in "abc"]
        await engine.abort(["a", "unknown", "c"])
        assert await core.hear() == AbortRequests([handles[0], handles[2]])
        await engine.abort(["a", "unknown"])
        await engine.abort("b")
        assert await core.hear() == AbortRequests([handles[1]])


async def test_leaving_a_loop_aborts_the_request(core: ScriptedCore) -> None:
    async with attached(core) as engine:

        async def take_one() -> None:
            async for _ in engine.generate(PROMPT, tokens()):
                break

        consuming = asyncio.create_task(take_one())
        request = await core.hear_request()
        await core.push_tokens(request.handle, 0, 5)
        await consuming
        assert await core.hear() == AbortRequests([request.handle])


async def test_a_finished_request_is_not_aborted(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5)
        await core.push_end(request.handle, FinishReason.LENGTH)
        assert await outputs_of(stream) == [5]
        stream.close()
        await engine.abort(stream.request_id)
        engine.shutdown()
        assert await core.hear() == Goodbye()


async def test_control_calls_are_answered_by_number(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        asking = asyncio.create_task(engine.get_stats())
        resetting = asyncio.create_task(engine.reset_prefix_cache())
        first, second = await core.hear(), await core.hear()
        assert isinstance(first, GetStats) and isinstance(second, ResetPrefixCache)
        await core.push(ControlReply(99, True))  # nobody's
        await core.push(ControlReply(second.call, False, "requests are running"))
        await core.push(ControlReply(first.call, True, stats=STATS))
        await core.push(ControlReply(first.call, True))  # once more
        assert await resetting is False
        assert await asking == STATS


async def test_a_control_call_that_gave_up_disturbs_nobody(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        given_up = asyncio.create_task(engine.get_stats())
        first = await core.hear()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        asking = asyncio.create_task(engine.get_stats())
        second = await core.hear()
        assert isinstance(first, GetStats) and isinstance(second, GetStats)
        await core.push(ControlReply(first.call, True, stats=None))
        await core.push(ControlReply(second.call, True, stats=STATS))
        assert await asking == STATS


async def test_an_oversized_request_is_refused_and_leaves_its_id_free(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        prompt = {"prompt_token_ids": PROMPT, "cache_salt": "x" * 2**25}
        with pytest.raises(MessageTooLargeError):
            await engine.add_request("a", prompt, tokens())
        stream, request = await ask(engine, core, "a")
        await core.push_tokens(request.handle, 0, 5)
        assert (await anext(stream)).outputs[0].token_ids == [5]


async def test_a_request_cancelled_while_it_waits_for_room_is_aborted(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attached(core) as engine:
        # As if the socket were full: what is sent has to wait for its turn.
        taking = False
        monkeypatch.setattr(
            connection_module.Connection,
            "_try_send",
            lambda self, frame, send=connection_module.Connection._try_send: (
                taking and send(self, frame)
            ),
        )
        waiting = asyncio.create_task(engine.add_request("a", PROMPT, tokens()))
        done, _ = await asyncio.wait([waiting], timeout=0.01)
        assert not done
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        taking = True
        request = await core.hear_request()
        assert await core.hear() == AbortRequests([request.handle])


# ---- what is heard


async def test_tokens_that_come_twice_are_given_once(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5, 6)
        await core.push_tokens(request.handle, 0, 5, 6)
        await core.push_tokens(request.handle, 1, 6, 7)
        await core.push_end(request.handle, FinishReason.LENGTH)
        await core.push_end(request.handle, FinishReason.LENGTH)
        assert await outputs_of(stream) == [5, 6, 7]


async def test_a_gap_ends_the_request_it_is_in_here_and_in_the_core(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        holed, request = await ask(engine, core)
        whole, other = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5)
        await core.push_tokens(request.handle, 2, 7)
        assert await core.hear() == AbortRequests([request.handle])
        await core.push_tokens(other.handle, 0, 5)
        await core.push_end(other.handle, FinishReason.LENGTH)
        assert (await anext(holed)).outputs[0].token_ids == [5]
        with pytest.raises(RequestFailedError, match="token 1 is missing"):
            await anext(holed)
        assert await outputs_of(whole) == [5]


async def test_outputs_of_another_core_are_not_for_this_session(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 666, epoch=EPOCH + 1)
        await core.push_tokens(request.handle, 0, 5)
        await core.push_end(request.handle, FinishReason.LENGTH)
        assert await outputs_of(stream) == [5]


async def test_garbage_and_messages_out_of_place_disturb_nobody(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        stream, request = await ask(engine, core)
        for nonsense in (b"", b"\xc1", b"\x91" * 1000, WELCOME, Progress("x", 0.0)):
            await core.push(nonsense)
            await core.answer(nonsense)
        await core.push_tokens(request.handle + 7, 3, 1)
        await core.push_tokens(request.handle, 0, 5)
        await core.push_end(request.handle, FinishReason.LENGTH)
        assert await outputs_of(stream) == [5]
        assert engine.is_running


async def test_a_request_that_the_core_could_not_finish_fails_alone(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        failed, request = await ask(engine, core, "a")
        whole, other = await ask(engine, core)
        finished = [Finished(request.handle, FinishReason.ERROR, "NaN logits")]
        await core.push(StepOutputs(EPOCH, [other.handle], [0], [5], finished=finished))
        await core.push_end(other.handle, FinishReason.LENGTH)
        with pytest.raises(RequestFailedError, match="'a': NaN logits"):
            await outputs_of(failed)
        assert await outputs_of(whole) == [5]
        assert engine.is_running


async def expect_death(engine: AsyncLLMEngine, core: ScriptedCore, words: str) -> None:
    """Two streams, two calls, and all that comes later must hear the same cause."""
    raised: list[EngineError] = []
    for ending in (
        engine.start(),
        engine.check_health(),
        engine.get_stats(),
        engine.add_request(None, PROMPT, tokens()),
        anext(engine.generate(PROMPT, tokens())),
    ):
        with pytest.raises(EngineDeadError, match=words) as caught:
            await ending
        raised.append(caught.value)
    assert set(raised) == {engine.dead_error}
    assert (engine.is_running, engine.is_stopped, engine.errored) == (False, True, True)
    engine.shutdown()
    assert not engine.errored


async def test_the_end_of_an_engine_reaches_every_stream_and_call(core: ScriptedCore) -> None:
    async with attached(core) as engine:
        ahead, request = await ask(engine, core)
        await core.push_tokens(request.handle, 0, 5, 6)
        waiting = [asyncio.create_task(anext(engine.generate(PROMPT, tokens()))) for _ in "ab"]
        waiting += [asyncio.create_task(call()) for call in (engine.get_stats,)]  # type: ignore[arg-type]
        for _ in waiting:
            await core.hear()
        words = "the engine was stopped: it was told to"
        await core.push(EngineStopping("it was told to"))
        for task in waiting:
            with pytest.raises(EngineDeadError, match=words):
                async with asyncio.timeout(PATIENCE_S):
                    await task
        assert (await anext(ahead)).outputs[0].token_ids == [5, 6], "it came before"
        with pytest.raises(EngineDeadError, match=words):
            await anext(ahead)
        await expect_death(engine, core, words)


async def test_a_core_that_dies_at_its_welcome_is_noticed(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=0.5)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    core.close()
    # Either the start fails, or the first question does; neither may wait for ever.
    with pytest.raises(EngineError, match="closed the connection"):
        async with asyncio.timeout(PATIENCE_S):
            await starting
            await engine.get_stats()
    engine.shutdown()


async def test_a_core_that_dies_before_its_welcome_fails_the_start(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=60)
    starting = asyncio.create_task(engine.start())
    await core.hear_hello()
    core.close()
    with pytest.raises(EngineStartError, match="closed the connection"):
        async with asyncio.timeout(PATIENCE_S):
            await starting
    assert not engine.errored, "another core may come"
    engine.shutdown()


async def test_an_engine_that_was_not_there_can_be_attached_to_later(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.hear_hello()
    await core.answer(Refused("start", "not now"))
    with pytest.raises(EngineStartError, match="not now"):
        await starting
    assert isinstance(await core.hear(), Goodbye)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    assert engine.is_running
    engine.shutdown()


async def test_a_core_of_another_version_is_refused_by_name(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.hear_hello()
    await core.answer(Refused("protocol", "the engine core speaks protocol 2.0, the client 1.0"))
    with pytest.raises(ProtocolMismatchError, match=r"2\.0"):
        await starting
    engine.shutdown()


async def test_progress_of_the_start_is_reported(core: ScriptedCore) -> None:
    heard: list[tuple[str, float]] = []
    engine = AsyncLLMEngine(
        address=core.address,
        start_timeout_s=PATIENCE_S,
        on_progress=lambda phase, fraction: heard.append((phase, fraction)),
    )
    starting = asyncio.create_task(engine.start())
    await core.hear_hello()
    for fraction in (0.0, 0.5):
        await core.answer(Progress("loading", fraction))
    await core.answer(WELCOME)
    await starting
    assert heard == [("loading", 0.0), ("loading", 0.5)]
    assert engine.start_phases == {"loading": 0.5}
    engine.shutdown()


async def test_an_engine_that_was_stopped_can_be_attached_to_again(core: ScriptedCore) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    asking = asyncio.create_task(engine.get_stats())
    await core.hear()
    await core.push(EngineStopping("it was told to"))
    with pytest.raises(EngineDeadError):
        await asking
    engine.shutdown()
    core.close()
    with ScriptedCore.at(core.address) as other:
        starting = asyncio.create_task(engine.start())
        await other.accept()
        await starting
        stream, request = await ask(engine, other)
        await other.push_tokens(request.handle, 0, 5)
        assert (await anext(stream)).outputs[0].token_ids == [5]
        engine.shutdown()
        with pytest.raises(EngineClosedError):
            await anext(stream)
