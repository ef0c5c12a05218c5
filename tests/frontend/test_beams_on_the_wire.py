"""Beam search through the client object: what it says to a core, and what it makes of the answers.

The core's part is played: it scores by a table.
"""

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from math import inf, log
from pathlib import Path

import msgspec
import pytest

from footplate.frontend import AsyncLLMEngine, BeamSearchParams, RequestOutput
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import (
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    RequestFailedError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    EngineStopping,
    Finished,
    FinishReason,
    LogprobRows,
    StepOutputs,
)

from .scripted_core import EPOCH, PATIENCE_S, WELCOME, ScriptedCore

pytestmark = pytest.mark.usefixtures("nothing_is_lost")

PROMPT = [20, 21]
A, B, C = 5, 6, 7
# What follows an output, by probability; None is the end of a grammar.
GARDEN: dict[tuple[int, ...], dict[int, float] | None] = {
    (): {A: 0.6, B: 0.4},
    (A,): {A: 0.5, B: 0.3, C: 0.2},
    (B,): {B: 0.9, A: 0.1, C: 0.0},
    (A, A): {A: 1.0},
    (B, B): None,
}
PARAMS = BeamSearchParams(beam_width=2, max_tokens=2, detokenize=False)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[ScriptedCore]:
    with ScriptedCore.at(f"ipc://{tmp_path}/engine.sock") as core:
        yield core


@pytest.fixture
async def engine(core: ScriptedCore) -> AsyncIterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.accept()
    await starting
    yield engine
    engine.shutdown()


def search(
    engine: AsyncLLMEngine, params: BeamSearchParams = PARAMS
) -> "asyncio.Task[list[RequestOutput]]":
    async def all_outputs() -> list[RequestOutput]:
        async with asyncio.timeout(PATIENCE_S):
            return [output async for output in engine.beam_search(PROMPT, params, "it")]

    return asyncio.create_task(all_outputs())


def scores_of(request: AddRequest) -> StepOutputs:
    """The answer of a core to a beam's request."""
    row = GARDEN[tuple(request.prior_token_ids)]
    if row is None:
        return StepOutputs(
            EPOCH, [], [], [], finished=[Finished(request.handle, FinishReason.STOP)]
        )
    best = list(row)
    logprobs = [log(p) if p else -inf for p in row.values()]
    position = len(request.prior_token_ids)
    rows = LogprobRows(
        request.handle,
        position,
        [1],
        array("i", [best[0], *best]).tobytes(),
        array("f", [logprobs[0], *logprobs]).tobytes(),
    )
    finished = [Finished(request.handle, FinishReason.LENGTH)]
    return StepOutputs(
        EPOCH, [request.handle], [position], [best[0]], finished=finished, logprobs=[rows]
    )


async def serve(core: ScriptedCore, asked: list[AddRequest]) -> None:
    with suppress(TimeoutError):
        while True:
            asked.append(await core.hear_request())
            await core.push(scores_of(asked[-1]))


async def test_a_search_is_served_beam_by_beam(engine: AsyncLLMEngine, core: ScriptedCore) -> None:
    asked: list[AddRequest] = []
    serving = asyncio.create_task(serve(core, asked))
    [output] = await search(engine)
    serving.cancel()
    assert (output.request_id, output.prompt_token_ids, output.finished) == ("it", PROMPT, True)
    assert [completion.token_ids for completion in output.outputs] == [[B, B], [A, A]]
    assert output.outputs[0].cumulative_logprob == pytest.approx(log(0.36))
    assert [request.prior_token_ids for request in asked] == [[], [A], [B]]
    assert {tuple(request.prompt_token_ids) for request in asked} == {tuple(PROMPT)}
    assert len({request.handle for request in asked}) == 3
    assert core.num_frames[-2:] == [1, 2], "the beams of a step arrive one by one"


async def test_a_request_that_stops_without_a_token_is_a_complete_beam(
    engine: AsyncLLMEngine, core: ScriptedCore
) -> None:
    serving = asyncio.create_task(serve(core, []))
    params = BeamSearchParams(beam_width=2, max_tokens=3, detokenize=False)
    [output] = await search(engine, params)
    serving.cancel()
    assert [(c.token_ids, c.finish_reason) for c in output.outputs] == [
        ([B, B], "stop"),  # 0.36 to the third root: its end counts as a token
        ([A, A, A], "length"),
    ]


async def test_leaving_a_search_aborts_its_beams(
    engine: AsyncLLMEngine, core: ScriptedCore
) -> None:
    task = search(engine)
    await core.push(scores_of(await core.hear_request()))
    handles = [(await core.hear_request()).handle for _ in range(2)]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    aborted = await core.hear()
    assert isinstance(aborted, AbortRequests), "one message for all"
    assert sorted(aborted.handles) == sorted(handles)


async def test_an_error_of_one_beam_is_the_searchs_and_aborts_the_others(
    engine: AsyncLLMEngine, core: ScriptedCore
) -> None:
    task = search(engine)
    await core.push(scores_of(await core.hear_request()))
    first, second = [(await core.hear_request()).handle for _ in range(2)]
    await core.push_end(second, FinishReason.ERROR, "the grammar allows nothing more")
    with pytest.raises(RequestFailedError, match="allows nothing more"):
        await task
    assert await core.hear() == AbortRequests([first])


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.DEADLINE])
async def test_a_beam_that_was_not_scored_fails_the_search(
    engine: AsyncLLMEngine, core: ScriptedCore, reason: FinishReason
) -> None:
    task = search(engine)
    await core.push_end((await core.hear_request()).handle, reason)
    with pytest.raises(RequestFailedError, match=str(reason)):
        await task


async def test_the_engines_death_is_the_searchs(engine: AsyncLLMEngine, core: ScriptedCore) -> None:
    task = search(engine)
    await core.push(scores_of(await core.hear_request()))
    await core.hear_request()
    await core.push(EngineStopping("it was killed"))
    with pytest.raises(EngineDeadError, match="it was killed"):
        await task


async def test_what_cannot_be_searched_is_refused(engine: AsyncLLMEngine) -> None:
    too_long = BeamSearchParams(beam_width=1, max_tokens=99, detokenize=False)
    for prompt, params, error in (
        (PROMPT, too_long, PromptTooLongError),
        ([], PARAMS, InvalidRequestError),
        ([1000], PARAMS, InvalidRequestError),
        (PROMPT, None, InvalidRequestError),
    ):
        with pytest.raises(error):
            async for _ in engine.beam_search(prompt, params):  # type: ignore[arg-type]
                pass


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (RequestConfig(max_num_queued_reqs=1), "2 requests can never wait together"),
        (RequestConfig(max_num_queued_tokens=3), "4 prompt tokens can never wait together"),
    ],
)
async def test_beams_that_can_never_wait_together_are_refused_before_the_search(
    core: ScriptedCore, limits: RequestConfig, words: str
) -> None:
    engine = AsyncLLMEngine.connect(core.address, timeout_s=PATIENCE_S)
    starting = asyncio.create_task(engine.start())
    await core.accept(msgspec.structs.replace(WELCOME, requests=limits))
    await starting
    with pytest.raises(InvalidRequestError, match=words):
        await search(engine)
    engine.shutdown()
