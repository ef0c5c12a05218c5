"""Clients that come back: what they say to a core, and what they make of its answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from footplate.frontend import AsyncLLMEngine, RequestOutputKind, SamplingParams
from footplate.protocol.errors import (
    DuplicateRequestError,
    EngineClosedError,
    EngineDeadError,
    InvalidParameterError,
    InvalidRequestError,
    RequestLostError,
)
from footplate.protocol.links import session_of
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
    AttachRequest,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Goodbye,
    Hello,
    Refused,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams

from .scripted_core import EPOCH, PATIENCE_S, WELCOME, ScriptedCore

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

KEY = "a secret that nobody guesses"
PROMPT = [20, 21]
TOKENS = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
PARAMS = TokenParams(1.0, 1.0, 0, 0.0, 7, 100, 0, ())
KEPT = AddRequest(41, PROMPT, PARAMS, request_id="mine", age_s=3.0)
NEXT = EPOCH + 1


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ScriptedCore]:
    with ScriptedCore.at(f"ipc://{tmp_path}/engine.sock") as core:
        yield core


@asynccontextmanager
async def connected(
    core: ScriptedCore, client_key: str | None = KEY
) -> AsyncIterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S, client_key=client_key)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    try:
        yield engine
    finally:
        engine.shutdown()


async def hear_question(core: ScriptedCore) -> AttachRequest:
    question = await core.hear()
    assert isinstance(question, AttachRequest)
    return question


async def attach(engine: AsyncLLMEngine, core: ScriptedCore, **given: Any) -> Any:
    """A stream of what the core has kept."""
    attaching = asyncio.create_task(engine.attach("mine", TOKENS, **given))
    question = await hear_question(core)
    assert question.request_id == "mine"
    await core.push(Attached(question.handle, KEPT))
    return await attaching


async def next_tokens(stream: Any) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return (await anext(stream)).outputs[0].token_ids  # type: ignore[no-any-return]


# ---- who it is


async def test_a_client_with_a_key_has_the_same_name_in_whatever_process(
    core: ScriptedCore,
) -> None:
    sessions = []
    for key in (KEY, KEY, KEY + "!", None, None):
        async with connected(core, key):
            assert core.hello is not None
            sessions.append(core.hello.session)
        assert isinstance(await core.hear(), Goodbye)
    assert sessions[0] == sessions[1] == session_of(KEY)
    assert len(set(sessions)) == 4


@pytest.mark.parametrize("key", ["fifteen letters", "x" * 257, "", b"x" * 20, 20 * 10**20])
def test_a_key_that_is_none_is_refused_and_not_repeated(key: Any) -> None:
    with pytest.raises(InvalidParameterError, match="secret string of 16 to 256") as caught:
        AsyncLLMEngine.connect("ipc:///x/y", client_key=key)
    assert not key or str(key) not in str(caught.value)


def test_an_engine_with_a_core_of_its_own_has_no_client_key() -> None:
    with pytest.raises(InvalidRequestError, match="a core of its own dies with its process"):
        AsyncLLMEngine(client_key=KEY)


async def test_who_is_superseded_ends_and_does_not_fight_for_its_place(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        stream = await engine.add_request("mine", PROMPT, TOKENS, detachable=True)
        await core.hear_request()
        await core.answer(Refused("superseded", "its session has another connection"))
        with pytest.raises(EngineDeadError, match="another engine object has connected"):
            await next_tokens(stream)
        assert engine.errored
        # Its old connection takes leave, of a core that knows it no longer.
        assert isinstance(await core.hear(), Goodbye)
        async with connected(core):
            pass


# ---- detachable requests


async def test_a_detachable_request_says_its_id_and_others_do_not(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        for name in ("mine", "other"):
            await engine.add_request(name, PROMPT, TOKENS, detachable=name == "mine")
        ids = [(await core.hear_request()).request_id for _ in range(2)]
        assert ids == ["mine", None]
        output = asyncio.ensure_future(
            anext(engine.generate(PROMPT, TOKENS, "third", detachable=True))
        )
        request = await core.hear_request()
        assert request.request_id == "third"
        await core.push_tokens(request.handle, 0, 5)
        assert (await output).outputs[0].token_ids == [5]


async def test_what_could_not_be_kept_is_refused_before_anything_is_sent(
    core: ScriptedCore,
) -> None:
    async with connected(core) as engine:
        for request_id, params in ((None, TOKENS), ("a", SamplingParams(n=2))):
            with pytest.raises(InvalidRequestError, match="outlives its client"):
                await engine.add_request(request_id, PROMPT, params, detachable=True)
        with pytest.raises(InvalidParameterError, match="detachable=1"):
            await engine.add_request("a", PROMPT, TOKENS, detachable=1)  # type: ignore[arg-type]
        asking = asyncio.create_task(engine.get_stats())
        assert isinstance(await core.hear(), GetStats)
        asking.cancel()
        engine.shutdown()
        assert isinstance(await core.hear(), Goodbye)
    async with connected(core, None) as engine:
        for call in (
            engine.add_request("a", PROMPT, TOKENS, detachable=True),
            engine.attach("a", TOKENS),
        ):
            with pytest.raises(InvalidRequestError, match="connect with a client_key"):
                await call
        with pytest.raises(InvalidRequestError, match="connected with a client_key"):
            engine.shutdown(detach=True)
        assert engine.is_running


async def test_a_shutdown_that_detaches_says_no_goodbye_and_what_was_aborted_is_aborted(
    core: ScriptedCore,
) -> None:
    async with connected(core) as engine:
        stream = await engine.add_request("mine", PROMPT, TOKENS, detachable=True)
        left = await engine.add_request("left", PROMPT, TOKENS, detachable=True)
        requests = [await core.hear_request() for _ in range(2)]
        left.close()
        engine.shutdown(detach=True)
        with pytest.raises(EngineClosedError):
            await next_tokens(stream)
        assert await core.hear() == AbortRequests([requests[1].handle])
        stream.close()
        async with connected(core):
            assert isinstance(core.hello, Hello)  # which came next


# ---- attaching


async def test_what_was_kept_goes_on_and_is_a_request_like_any_other(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        stream = await attach(engine, core, from_position=2)
        handle = stream.handle
        await core.push_tokens(handle, 0, 5, 6, 7)
        assert await next_tokens(stream) == [7]
        core.close()
        with ScriptedCore.at(core.address) as other:
            await other.accept(replace(WELCOME, epoch=NEXT))
            again = await other.hear_request()
            assert again == replace(
                KEPT, handle=handle, prior_token_ids=[5, 6, 7], is_replay=True, age_s=again.age_s
            )
            assert again.age_s >= KEPT.age_s
            await other.push_tokens(handle, 3, 8, epoch=NEXT)
            assert await next_tokens(stream) == [8]
            await engine.abort("mine")
            assert await other.hear() == AbortRequests([handle])
            engine.shutdown()


async def test_what_is_not_kept_is_lost_and_its_id_is_free(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        for _ in range(2):
            attaching = asyncio.create_task(engine.attach("mine", TOKENS))
            question = await hear_question(core)
            lost = Finished(question.handle, FinishReason.ERROR, "", ErrorKind.LOST)
            await core.push(StepOutputs(EPOCH, [], [], [], finished=[lost]))
            with pytest.raises(RequestLostError, match="its lease has expired"):
                await attaching


async def test_what_is_live_here_cannot_be_attached_to(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        await engine.add_request("mine", PROMPT, TOKENS, detachable=True)
        await core.hear_request()
        with pytest.raises(DuplicateRequestError):
            await engine.attach("mine", TOKENS)
        for position in (-1, 1.0, True, None, 2**31):
            with pytest.raises(InvalidParameterError, match="from_position="):
                await engine.attach("a", TOKENS, from_position=position)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="must be SamplingParams"):
            await engine.attach("a", {"n": 1})  # type: ignore[arg-type]


async def test_who_gives_up_waiting_aborts_nothing_and_may_ask_again(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        attaching = asyncio.create_task(engine.attach("mine", TOKENS))
        first = await hear_question(core)
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        await core.push(Attached(first.handle, KEPT))
        stream = await attach(engine, core)
        assert stream.handle != first.handle
        await core.push_tokens(first.handle, 0, 5)
        await core.push_tokens(stream.handle, 0, 5, 6)
        assert await next_tokens(stream) == [5, 6]
        stream.close()
        assert await core.hear() == AbortRequests([stream.handle])


async def test_a_core_that_dies_before_its_answer_is_followed_by_one_that_is_asked(
    core: ScriptedCore,
) -> None:
    async with connected(core) as engine:
        attaching = asyncio.create_task(engine.attach("mine", TOKENS))
        question = await hear_question(core)
        core.close()
        with ScriptedCore.at(core.address) as other:
            await other.accept(replace(WELCOME, epoch=NEXT))
            assert await other.hear() == question
            lost = Finished(question.handle, FinishReason.ERROR, "", ErrorKind.LOST)
            await other.push(StepOutputs(NEXT, [], [], [], finished=[lost]))
            with pytest.raises(RequestLostError, match="core was replaced"):
                await attaching
            engine.shutdown()


async def test_a_shutdown_ends_the_wait_for_an_answer(core: ScriptedCore) -> None:
    async with connected(core) as engine:
        attaching = asyncio.create_task(engine.attach("mine", TOKENS))
        await hear_question(core)
        engine.shutdown()
        with pytest.raises(EngineClosedError):
            await attaching
