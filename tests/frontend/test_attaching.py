"""A stream of a request that the core has already: what it hands out, and what it is afterwards."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from footplate.frontend import RequestMetrics, RequestOutputKind, SamplingParams
from footplate.frontend.attaching import AttachingStream, MakeText, require_detachable
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.output_text import OutputText
from footplate.frontend.replay import continuation
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings, Tokenizer, load_tokenizer
from footplate.protocol.errors import (
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
    RequestLostError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
    AttachRequest,
    ErrorKind,
    Finished,
    FinishReason,
    ParkRequests,
    Started,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
NOW = 50.0
PLAIN = TokenParams(1.0, 1.0, 0, 0.0, 7, 100, 0, ())
REQUEST = AddRequest(3, [1, 2], PLAIN, 0, "salt", age_s=2.0, request_id="mine")
# Characters of one to four bytes, each byte a token; stop strings that begin and do not go on.
TEXT = "aé世🚂 STO STOP b世, and more"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def maker(tokenizer: Tokenizer, params: SamplingParams) -> MakeText:
    def make(prompt_token_ids: list[int], min_tokens: int) -> OutputText:
        stops = params.stop_strings
        found = StopStrings(stops, params.include_stop_str_in_output) if stops else None
        return OutputText(tokenizer.detokenizer(prompt_token_ids), found, min_tokens)

    return make


def ask_for(
    client: EngineClient,
    from_position: int = 0,
    tokenizer: Tokenizer | None = None,
    max_unread_tokens: int | None = None,
    **given: Any,
) -> AttachingStream:
    """A stream whose question is on its way."""
    params = SamplingParams(**given)
    stream = AttachingStream(
        "mine",
        client.new_handles(1),
        params,
        None if tokenizer is None else maker(tokenizer, params),
        from_position,
        RequestMetrics(1_000.0, NOW - 1),
        lambda stream: None,
        max_unread_tokens=max_unread_tokens,
        notices=client.notices,
    )
    client.open(stream)
    assert client.ask_for(stream) == AttachRequest(stream.handle, "mine")
    return stream


def attach(client: EngineClient, *arguments: Any, **given: Any) -> AttachingStream:
    """A stream whose question has been answered."""
    stream = ask_for(client, *arguments, **given)
    assert client.attach(Attached(stream.handle, REQUEST), NOW) == []
    return stream


def receive(
    client: EngineClient, stream: RequestStream, position: int, token_ids: list[int]
) -> list[int]:
    return client.handle(
        StepOutputs(9, [stream.handle], [position], token_ids, [len(token_ids)]), NOW
    )


def end(client: EngineClient, stream: RequestStream, *of: Any) -> None:
    finished = [Finished(stream.handle, *(of or (FinishReason.LENGTH,)))]
    client.handle(StepOutputs(9, [], [], [], finished=finished), NOW)


async def read(stream: RequestStream) -> list[tuple[str, list[int], str | None]]:
    outputs = [output.outputs[0] async for output in stream]
    return [(o.text, o.token_ids, o.finish_reason) for o in outputs]


# ---- what is handed out


async def taken_one_by_one(
    tokenizer: Tokenizer, token_ids: list[int], params: SamplingParams
) -> tuple[list[str], str | None]:
    """The text that the first consumer had behind each token, and at the end; how it ended."""
    client = EngineClient()
    metrics = RequestMetrics(0.0, 0.0)
    stream = RequestStream("mine", client.new_handles(1), params, 7, metrics, lambda _: None)
    stream.begin("", [1, 2], partial(maker(tokenizer, params), [1, 2], 0))
    client.open(stream)
    seen, reason = [""], None
    for position, token_id in enumerate(token_ids):
        receive(client, stream, position, [token_id])
        output = (await anext(stream)).outputs[0]
        seen.append(seen[-1] + output.text)
        if (reason := output.finish_reason) is not None:
            return seen, reason
    end(client, stream)
    return [*seen, seen[-1] + (await anext(stream)).outputs[0].text], "length"


@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "cumulative"])
@pytest.mark.parametrize(
    "stop", [(), ("STOP",), ("世, and",), ("STORE",)], ids=["none", "ascii", "unicode", "never"]
)
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
async def test_from_every_position_on_it_hands_out_exactly_the_rest(
    tokenizer: Tokenizer, stop: tuple[str, ...], is_delta: bool, is_cut: bool
) -> None:
    dice = random.Random(5)
    kind = RequestOutputKind.DELTA if is_delta else RequestOutputKind.CUMULATIVE
    token_ids = tokenizer.encode(TEXT)
    if is_cut:
        token_ids = token_ids[: token_ids.index(tokenizer.encode("🚂")[3])]
    params = SamplingParams(stop=stop, output_kind=RequestOutputKind.DELTA)
    seen, reason = await taken_one_by_one(tokenizer, token_ids, params)
    num_tokens = len(seen) - (1 if reason == "stop" else 2)
    for from_position in range(num_tokens + 1):
        client = EngineClient()
        stream = attach(client, from_position, tokenizer, stop=stop, output_kind=kind)
        outputs, position = [], 0
        while position < len(token_ids) and not stream.is_finished:
            run = token_ids[position : position + dice.choice((1, 2, 5, 40))]
            assert receive(client, stream, position, run) == []
            assert client.notices.take() == (
                [AbortRequests([stream.handle], have_ended=True)] if stream.is_finished else []
            )
            position += len(run)
            if (due := stream._due()) and dice.random() < 0.5:
                outputs.append(stream._take(due).outputs[0])
        end(client, stream)
        outputs += [output.outputs[0] async for output in stream]
        assert outputs[-1].finish_reason == reason
        if is_delta:
            assert [t for o in outputs for t in o.token_ids] == token_ids[from_position:num_tokens]
            assert seen[from_position] + "".join(o.text for o in outputs) == seen[-1]
        else:
            assert outputs[-1].token_ids == token_ids[:num_tokens]
            assert outputs[-1].text == seen[-1]


async def test_one_output_for_all_holds_all() -> None:
    client = EngineClient()
    stream = attach(client, 2, output_kind=FINAL_ONLY, detokenize=False)
    receive(client, stream, 0, [5, 6, 7])
    assert not stream._due()
    end(client, stream)
    assert await read(stream) == [("", [5, 6, 7], "length")]


async def test_it_waits_until_there_is_more_than_was_handed_out() -> None:
    client = EngineClient()
    stream = attach(client, 3, output_kind=DELTA, detokenize=False)
    receive(client, stream, 0, [5, 6])
    assert not stream._due()
    receive(client, stream, 2, [7])
    assert not stream._due()
    receive(client, stream, 3, [8])
    assert (await anext(stream)).outputs[0].token_ids == [8]


@pytest.mark.parametrize("from_position", [2, 3, 99])
async def test_one_that_has_no_more_tokens_has_an_end(from_position: int) -> None:
    client = EngineClient()
    stream = attach(client, from_position, output_kind=DELTA, detokenize=False)
    receive(client, stream, 0, [5, 6])
    end(client, stream)
    assert await read(stream) == [("", [], "length")]


async def test_what_was_handed_out_before_is_no_news_when_the_engine_dies() -> None:
    client = EngineClient()
    stream = attach(client, 3, output_kind=DELTA, detokenize=False)
    receive(client, stream, 0, [5, 6])
    client.fail_all(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError):
        await anext(stream)


async def test_min_tokens_of_the_request_count_and_not_those_that_were_given_again(
    tokenizer: Tokenizer,
) -> None:
    client, token_ids = EngineClient(), tokenizer.encode("abab")
    stream = ask_for(client, 0, tokenizer, stop=("ab",))
    request = replace(REQUEST, params=replace(PLAIN, min_tokens=2))
    client.attach(Attached(stream.handle, request), NOW)
    receive(client, stream, 0, token_ids)
    assert (await read(stream))[-1][0] == "ab"


async def test_one_that_nobody_reads_is_parked_only_for_what_is_new() -> None:
    client = EngineClient()
    stream = attach(client, 9, output_kind=DELTA, detokenize=False, max_unread_tokens=2)
    receive(client, stream, 0, [5] * 9)
    assert client.notices.take() == []
    receive(client, stream, 9, [5] * 4)
    assert client.notices.take() == [ParkRequests([stream.handle])]


# ---- the answer


async def test_it_is_the_request_that_the_core_tells_of() -> None:
    client = EngineClient()
    stream = attach(client, detokenize=False, seed=99)
    await stream.until_attached()
    assert (stream.prompt, stream.prompt_token_ids, stream.seed) == (None, [1, 2], 7)
    assert (stream.metrics.arrival, stream.metrics.arrival_time) == (NOW - 2, 999.0)
    assert client.waiting.num_reqs == 1
    started = [Started(stream.handle, 1, 0.5, 0.25)]
    client.handle(StepOutputs(9, [], [], [], started=started), NOW)
    assert client.waiting.num_reqs == 0


async def test_one_that_is_lost_says_so() -> None:
    client = EngineClient()
    stream = ask_for(client)
    end(client, stream, FinishReason.ERROR, "told in the core's words", ErrorKind.LOST)
    with pytest.raises(RequestLostError, match="'mine': nothing of this id is kept"):
        await stream.until_attached()
    assert client.num_live == 0


async def test_one_that_ended_with_an_error_is_there_and_hands_it_out() -> None:
    client = EngineClient()
    stream = attach(client, detokenize=False)
    receive(client, stream, 0, [5])
    end(client, stream, FinishReason.ERROR, "not a number")
    await stream.until_attached()
    assert (await anext(stream)).outputs[0].token_ids == [5]
    with pytest.raises(RequestFailedError, match="not a number"):
        await anext(stream)


async def test_one_that_is_aborted_before_the_answer_has_ended() -> None:
    client = EngineClient()
    stream = ask_for(client, 4, output_kind=DELTA)
    assert client.abort(["mine"]) == AbortRequests([stream.handle])
    await stream.until_attached()
    assert await read(stream) == [("", [], "abort")]
    assert client.attach(Attached(stream.handle, REQUEST), NOW) == []
    assert client.num_live == 0


async def test_an_answer_to_a_question_that_was_not_asked_changes_nothing() -> None:
    client = EngineClient()
    stream = attach(client, detokenize=False)
    receive(client, stream, 0, [5])
    sent = stream.sent
    assert client.attach(Attached(stream.handle, replace(REQUEST, prompt_token_ids=[8])), NOW) == []
    assert (stream.prompt_token_ids, stream.sent) == ([1, 2], sent)


# ---- in another core


async def test_a_question_without_an_answer_is_asked_again() -> None:
    client = EngineClient()
    stream = ask_for(client)
    assert client.replay(NOW) == [AttachRequest(stream.handle, "mine")]


@pytest.mark.parametrize("prior", [[], [5, 6]])
async def test_it_goes_on_under_its_id_behind_what_has_come(prior: list[int]) -> None:
    # It may have come to that core as a replay itself, and run alone.
    client = EngineClient()
    stream = ask_for(client, 1, detokenize=False)
    told = replace(REQUEST, prior_token_ids=prior, is_replay=True, run_alone=True)
    client.attach(Attached(stream.handle, told), NOW)
    expected = replace(
        REQUEST, handle=stream.handle, prior_token_ids=[], is_replay=True, run_alone=False
    )
    assert continuation(stream, NOW) == [expected]
    receive(client, stream, 0, [5])
    [message] = continuation(stream, NOW)
    assert message == replace(expected, prior_token_ids=[5])


# ---- what can outlive its client


@pytest.mark.parametrize(
    ("request_id", "params", "words"),
    [
        (None, {}, "needs a request_id of its own"),
        ("", {}, "needs a request_id of its own"),
        (5, {}, "needs a request_id of its own"),
        ("x" * 513, {}, "at most 512 characters"),
        ("\ud800", {}, "surrogate"),
        ("a", {"n": 2}, "has n=1"),
        ("a", {"logprobs": 0}, "no logprobs"),
        ("a", {"prompt_logprobs": 1}, "no logprobs"),
        ("a", {"logprob_token_ids": [3]}, "no logprobs"),
        ("a", {"prompt_logprob_token_ids": [3]}, "no logprobs"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    request_id: Any, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        require_detachable(request_id, SamplingParams(**params), has_client_key=True)


def test_nothing_is_kept_without_a_client_key() -> None:
    require_detachable("x" * 512, SamplingParams(stop="a"), has_client_key=True)
    with pytest.raises(InvalidRequestError, match="connect with a client_key"):
        require_detachable("x", SamplingParams(), has_client_key=False)
