"""One stream, pushed by hand: what its consumer sees, and when."""

import asyncio
import contextlib
import random
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from footplate.frontend import (
    CompletionOutput,
    FlatLogprobs,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from footplate.frontend.output_text import OutputText
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings
from footplate.protocol.errors import EngineDeadError, RequestFailedError
from footplate.protocol.messages import Finished, FinishReason, LogprobRows, Started

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Characters:
    """A detokenizer to which a token id is a code point."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def finish(self) -> str:
        return "~"  # what a real one shows for an unfinished character


def ids(text: str) -> list[int]:
    return [ord(char) for char in text]


def _make_text(stops: tuple[str, ...], params: SamplingParams) -> OutputText:
    found = StopStrings(stops, params.include_stop_str_in_output) if stops else None
    return OutputText(Characters(), found, params.min_tokens)


class Consumer:
    """A stream, what its owner was told, and a shorthand for pushing and taking."""

    def __init__(self, **params: Any) -> None:
        self.abandoned: list[RequestStream] = []
        given = SamplingParams(**params)
        stops = given.stop_strings
        self.stream = RequestStream(
            "r1", 7, given, 5, RequestMetrics(1.0, 2.0), self.abandoned.append
        )
        make_text = partial(_make_text, stops, given) if given.detokenize else None
        self.stream.begin("prompt", [1, 2], make_text)

    def push(self, text: str, now: float = 3.0, *, index: int = 0) -> bool:
        return self.stream.completions[index].push(ids(text), now)

    def finish(self, reason: FinishReason = FinishReason.LENGTH, *, index: int = 0) -> None:
        self.stream.completions[index].finish(Finished(7 + index, reason))

    async def take(self) -> CompletionOutput:
        """What is there by now; it is an error to wait for anything."""
        async with asyncio.timeout(0):
            output = await anext(self.stream)
        return output.outputs[0]

    async def rest(self) -> list[CompletionOutput]:
        async with asyncio.timeout(5):
            return [output.outputs[0] async for output in self.stream]


# ---- what an output holds


async def test_a_cumulative_output_holds_everything_so_far() -> None:
    consumer = Consumer()
    consumer.push("ab")
    assert (await consumer.take()).text == "ab"
    consumer.push("c")
    consumer.finish()
    (last,) = await consumer.rest()
    assert (last.text, last.token_ids, last.finish_reason) == ("abc~", ids("abc"), "length")


async def test_a_delta_holds_what_is_new() -> None:
    consumer = Consumer(output_kind=DELTA)
    consumer.push("ab")
    assert (await consumer.take()).text == "ab"
    consumer.push("c")
    second = await consumer.take()
    assert (second.text, second.token_ids, second.finished) == ("c", ids("c"), False)
    consumer.finish()
    (last,) = await consumer.rest()
    assert (last.text, last.token_ids, last.finished) == ("~", [], True)


async def test_a_final_output_waits_for_the_end() -> None:
    consumer = Consumer(output_kind=FINAL_ONLY)
    consumer.push("ab")
    with pytest.raises(TimeoutError):
        await consumer.take()
    consumer.push("c")
    consumer.finish()
    (only,) = await consumer.rest()
    assert (only.text, only.token_ids) == ("abc~", ids("abc"))


async def test_an_output_carries_what_belongs_to_its_request() -> None:
    consumer = Consumer()
    consumer.stream.start(Started(7, 16, 0.5, 0.25))
    consumer.push("a", now=3.0)
    consumer.push("b", now=4.0)
    output = await anext(consumer.stream)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r1", "prompt", [1, 2])
    assert (output.seed, output.num_cached_tokens, output.finished) == (5, 16, False)
    metrics = output.metrics
    assert (metrics.first_token, metrics.last_token) == (3.0, 4.0)
    assert (metrics.queue_time_s, metrics.prefill_time_s) == (0.5, 0.25)
    assert metrics.time_to_first_token_s == 1.0
    assert RequestMetrics(1.0, 2.0).time_to_first_token_s is None


async def test_outputs_do_not_change_after_they_were_taken() -> None:
    consumer = Consumer()
    consumer.push("a")
    first = await consumer.take()
    consumer.push("b")
    await consumer.take()
    assert first.token_ids == ids("a")


async def test_without_detokenizing_there_are_ids_and_no_text() -> None:
    consumer = Consumer(detokenize=False)
    consumer.push("ab")
    consumer.finish()
    (only,) = await consumer.rest()
    assert (only.text, only.token_ids) == ("", ids("ab"))


@pytest.mark.parametrize("seed", range(20))
async def test_deltas_join_to_the_final_output_however_tokens_came_and_were_taken(
    seed: int,
) -> None:
    dice = random.Random(seed)
    text = "".join(dice.choice("abc") for _ in range(200))
    outcomes = []
    for kind in RequestOutputKind:
        consumer, taken, start = Consumer(output_kind=kind, stop=["cabc", "bb"]), [], 0
        while start < len(text) and not consumer.stream.is_finished:
            end = start + dice.randrange(1, 8)
            consumer.push(text[start:end])
            start = end
            if kind is not FINAL_ONLY and dice.randrange(2):
                taken.append(await consumer.take())
        consumer.finish()  # crosses the stop string's end on the wire
        taken += await consumer.rest()
        parts = taken if kind is DELTA else taken[-1:]
        outcomes.append(
            (
                "".join(output.text for output in parts),
                [token_id for output in parts for token_id in output.token_ids],
                taken[-1].finish_reason,
                taken[-1].stop_reason,
            )
        )
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][2:] in {("stop", "cabc"), ("stop", "bb")}
    assert "".join(map(chr, outcomes[0][1])).endswith(str(outcomes[0][3]))


# ---- a slow consumer, and one that waits


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, DELTA])
async def test_what_a_slow_consumer_has_not_taken_is_one_output(kind: RequestOutputKind) -> None:
    consumer = Consumer(output_kind=kind)
    for _ in range(1000):
        consumer.push("a")
    assert (await consumer.take()).token_ids == ids("a") * 1000
    with pytest.raises(TimeoutError):
        await consumer.take()


@pytest.mark.parametrize("event", ["push", "finish", "abort"])
async def test_a_waiting_consumer_is_woken(event: str) -> None:
    consumer = Consumer()
    waiting = asyncio.create_task(consumer.rest())
    await asyncio.sleep(0)
    match event:
        case "push":
            consumer.push("a")
            await asyncio.sleep(0)
            consumer.finish()
        case "finish":
            consumer.finish()
        case "abort":
            consumer.stream.abort()
    assert (await waiting)[-1].finish_reason == ("abort" if event == "abort" else "length")


async def test_a_consumer_that_gave_up_waiting_may_come_back() -> None:
    consumer = Consumer()
    for text in ("a", "ab"):
        with pytest.raises(TimeoutError):
            await consumer.take()
        consumer.push(text[-1])
        assert (await consumer.take()).text == text


# ---- the end


async def test_a_stream_ends_once() -> None:
    consumer = Consumer()
    consumer.push("a")
    consumer.stream.abort()
    consumer.finish(FinishReason.STOP)
    consumer.stream.fail(EngineDeadError("too late"))
    (only,) = await consumer.rest()
    assert only.finish_reason == "abort"
    assert await consumer.rest() == []


async def test_what_arrived_before_an_error_comes_first() -> None:
    consumer = Consumer()
    consumer.push("ab")
    consumer.stream.fail(EngineDeadError("killed"))
    assert (await consumer.take()).text == "ab"
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="killed"):
            await consumer.take()


async def test_a_final_only_stream_that_fails_shows_no_half_of_its_output() -> None:
    consumer = Consumer(output_kind=FINAL_ONLY)
    consumer.push("ab")
    consumer.stream.fail(EngineDeadError("killed"))
    with pytest.raises(EngineDeadError):
        await consumer.take()


async def test_a_request_that_the_core_could_not_finish_raises_and_names_itself() -> None:
    consumer = Consumer()
    consumer.push("ab")
    consumer.finish(FinishReason.ERROR)
    consumer.stream.abort(RequestFailedError("request 'r1': NaN logits"))
    last = await consumer.take()
    assert (last.token_ids, last.finish_reason) == (ids("ab"), "error")
    with pytest.raises(RequestFailedError, match="'r1': NaN logits"):
        await consumer.take()


async def test_a_second_consumer_is_refused_while_the_first_one_waits() -> None:
    consumer = Consumer()
    first = asyncio.create_task(anext(consumer.stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two consumers"):
        await anext(consumer.stream)
    consumer.push("a")
    assert (await first).outputs[0].text == "a"


async def test_a_stop_token_is_the_stop_reason_and_an_end_of_sequence_token_is_not() -> None:
    for last, stop_reason in (("x", ord("x")), ("e", None)):
        consumer = Consumer(stop_token_ids=ids("x"))
        consumer.push("a" + last)
        consumer.finish(FinishReason.STOP)
        (only,) = await consumer.rest()
        assert (only.finish_reason, only.stop_reason) == ("stop", stop_reason)


async def test_a_length_limit_reached_with_a_stop_token_is_no_stop() -> None:
    consumer = Consumer(stop_token_ids=ids("x"))
    consumer.push("x")
    consumer.finish(FinishReason.LENGTH)
    (only,) = await consumer.rest()
    assert (only.finish_reason, only.stop_reason) == ("length", None)


# ---- leaving early


async def test_closing_a_stream_abandons_its_request_once() -> None:
    consumer = Consumer()
    consumer.push("a")
    consumer.stream.close()
    assert consumer.abandoned == [consumer.stream]
    consumer.stream.abort()  # what the owner does about it
    await consumer.stream.aclose()
    assert consumer.abandoned == [consumer.stream]
    assert await consumer.rest() == []


async def test_closing_a_finished_stream_abandons_nothing() -> None:
    for end in (Consumer.finish, lambda c: c.stream.fail(EngineDeadError("killed"))):
        consumer = Consumer()
        end(consumer)
        consumer.stream.close()
        assert not consumer.abandoned


async def test_closing_a_stream_ends_the_wait_of_its_consumer() -> None:
    consumer = Consumer()
    waiting = asyncio.create_task(consumer.rest())
    await asyncio.sleep(0)
    consumer.stream.close()
    consumer.stream.abort()
    assert await waiting == []


# ---- stop strings


async def test_a_stop_string_across_tokens_ends_the_stream_at_the_token_that_completed_it() -> None:
    consumer = Consumer(stop=["END"], output_kind=DELTA)
    assert not consumer.push("abE")
    first = await consumer.take()
    assert (first.text, first.token_ids) == ("ab", ids("abE")), "E may be the start of a stop"
    assert consumer.push("NDxyz"), "the caller is told to abort in the core"
    (last,) = await consumer.rest()
    assert (last.text, last.token_ids) == ("", ids("ND")), "xyz was never asked for"
    assert (last.finish_reason, last.stop_reason) == ("stop", "END")


async def test_a_stop_string_stays_in_the_text_on_request() -> None:
    consumer = Consumer(stop="END", include_stop_str_in_output=True)
    assert consumer.push("abEND!")
    (only,) = await consumer.rest()
    assert (only.text, only.stop_reason) == ("abEND", "END")


async def test_text_that_did_not_become_a_stop_string_is_released_at_the_end() -> None:
    consumer = Consumer(stop=["END"])
    consumer.push("abEN")
    assert (await consumer.take()).text == "ab"
    consumer.finish()
    (last,) = await consumer.rest()
    assert (last.text, last.finish_reason, last.stop_reason) == ("abEN~", "length", None)


async def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    consumer = Consumer(stop=["x"], min_tokens=3)
    assert not consumer.push("axx")
    assert consumer.push("bxc")
    (only,) = await consumer.rest()
    assert (only.text, only.token_ids) == ("axxb", ids("axxbx"))


async def test_a_stop_string_that_began_before_min_tokens_counts_when_it_is_complete() -> None:
    consumer = Consumer(stop=["xyz"], min_tokens=3, output_kind=RequestOutputKind.DELTA)
    assert not consumer.push("axy")
    assert (await consumer.take()).text == "a"
    assert consumer.push("zc")
    (only,) = await consumer.rest()
    assert (only.text, only.token_ids, only.stop_reason) == ("", ids("z"), "xyz")


async def test_what_is_flushed_at_the_end_matches_no_stop_string() -> None:
    consumer = Consumer(stop=["~"])
    consumer.push("ab")
    consumer.finish()
    (only,) = await consumer.rest()
    assert (only.text, only.finish_reason, only.stop_reason) == ("ab~", "length", None)


async def test_an_aborted_stream_releases_the_text_it_held_back() -> None:
    consumer = Consumer(stop=["END"])
    consumer.push("abE")
    consumer.stream.abort()
    (only,) = await consumer.rest()
    assert (only.text, only.finish_reason) == ("abE~", "abort")


# ---- several completions


async def outputs_now(stream: RequestStream) -> RequestOutput:
    """What is there by now; it is an error to wait for anything."""
    async with asyncio.timeout(0):
        return await anext(stream)


async def test_an_output_holds_the_completions_that_have_news() -> None:
    consumer = Consumer(n=3, output_kind=DELTA)
    assert [c.handle for c in consumer.stream.completions] == [7, 8, 9]
    consumer.push("ab", index=2)
    consumer.push("c", index=0)
    first = await outputs_now(consumer.stream)
    assert [(c.index, c.text) for c in first.outputs] == [(0, "c"), (2, "ab")]
    consumer.push("d", index=1)
    second = await outputs_now(consumer.stream)
    assert [(c.index, c.text) for c in second.outputs] == [(1, "d")]
    assert not second.finished


async def test_a_request_is_finished_when_its_last_completion_is() -> None:
    consumer = Consumer(n=2)
    consumer.push("a", index=0)
    consumer.push("b", index=1)
    consumer.finish(index=1)
    first = await outputs_now(consumer.stream)
    assert [(c.index, c.finish_reason) for c in first.outputs] == [(0, None), (1, "length")]
    assert not first.finished and not consumer.stream.is_finished
    consumer.finish(FinishReason.STOP, index=0)
    last = await outputs_now(consumer.stream)
    assert [(c.index, c.finish_reason) for c in last.outputs] == [(0, "stop")]
    assert last.finished and consumer.stream.is_finished
    assert [output async for output in consumer.stream] == []


async def test_a_final_output_holds_all_completions_in_order() -> None:
    consumer = Consumer(n=3, output_kind=FINAL_ONLY)
    waiting = asyncio.create_task(anext(consumer.stream))
    for index in (2, 0, 1):
        assert not waiting.done()
        consumer.push("abc"[index], index=index)
        consumer.finish(index=index)
        await asyncio.sleep(0)
    only = await waiting
    assert [(c.index, c.text) for c in only.outputs] == [(0, "a~"), (1, "b~"), (2, "c~")]
    assert only.finished
    assert [output async for output in consumer.stream] == []


async def test_each_completion_looks_for_stop_strings_by_itself() -> None:
    consumer = Consumer(n=2, stop=["xy"])
    assert not consumer.push("ax", index=0)
    assert not consumer.push("y", index=1), "its x is not the other's"
    assert consumer.push("y", index=0)
    output = await outputs_now(consumer.stream)
    assert [(c.text, c.stop_reason) for c in output.outputs] == [("a", "xy"), ("y", None)]


async def test_aborting_ends_all_completions() -> None:
    consumer = Consumer(n=2)
    consumer.push("a", index=1)
    consumer.finish(index=1)
    consumer.stream.abort()
    output = await outputs_now(consumer.stream)
    assert [c.finish_reason for c in output.outputs] == ["abort", "length"]
    assert output.finished


# ---- intervals


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, DELTA])
async def test_outputs_come_at_the_first_token_then_every_interval_then_at_the_end(
    kind: RequestOutputKind,
) -> None:
    consumer = Consumer(output_kind=kind, stream_interval=3)
    lengths = []
    for number in range(1, 9):
        consumer.push("a")
        with contextlib.suppress(TimeoutError):
            await consumer.take()
            lengths.append(number)
    assert lengths == [1, 4, 7]
    consumer.finish()
    last = await consumer.take()
    assert last.finished and len(last.token_ids) == (1 if kind is DELTA else 8)


async def test_the_engines_interval_is_that_of_requests_that_name_none() -> None:
    def is_due_after_two(own: int | None, engines: int) -> bool:
        params = SamplingParams(stream_interval=own, detokenize=False)
        metrics = RequestMetrics(1.0, 2.0)
        stream = RequestStream("r", 7, params, 5, metrics, lambda stream: None, engines)
        [completion] = stream.completions
        completion.push([1], 3.0)
        completion.take(params, engines if own is None else own)
        completion.push([2], 3.0)
        return completion.is_due

    assert [is_due_after_two(*each) for each in ((None, 1), (None, 2), (1, 2), (2, 1))] == [
        True,
        False,
        True,
        False,
    ]


async def test_what_arrived_before_an_error_comes_whatever_the_interval() -> None:
    consumer = Consumer(stream_interval=10)
    consumer.push("a")
    await consumer.take()
    consumer.push("b")
    consumer.stream.fail(EngineDeadError("killed"))
    assert (await consumer.take()).text == "ab"
    with pytest.raises(EngineDeadError):
        await consumer.take()


# ---- logprobs


def rows(position: int, *scores: list[tuple[str, float]], rank: int = 1) -> LogprobRows:
    """Rows of (token, score), the token itself first."""
    entries = [entry for row in scores for entry in row]
    return LogprobRows(
        7,
        position,
        [rank] * len(scores),
        array("i", [ord(token) for token, _ in entries]).tobytes(),
        array("f", [score for _, score in entries]).tobytes(),
    )


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, DELTA])
async def test_logprobs_go_with_the_tokens_they_belong_to(kind: RequestOutputKind) -> None:
    consumer = Consumer(logprobs=1, output_kind=kind)
    [completion] = consumer.stream.completions
    assert completion.push_logprobs(rows(0, [("a", -1.5), ("b", -0.5)], rank=3))
    consumer.push("a")
    first = await consumer.take()
    a = {ord("a"): Logprob(-1.5, 3, None), ord("b"): Logprob(-0.5, 1, None)}
    assert (first.logprobs, first.cumulative_logprob) == ([a], -1.5)
    assert completion.push_logprobs(rows(1, [("c", -0.25), ("c", -0.25)]))
    consumer.push("c")
    second = await consumer.take()
    c = {ord("c"): Logprob(-0.25, 1, None)}
    assert second.logprobs == ([c] if kind is DELTA else [a, c])
    assert second.cumulative_logprob == -1.75


@pytest.mark.parametrize("flat", [False, True])
async def test_cumulative_logprobs_are_objects_once_and_earlier_outputs_stay_as_they_were(
    flat: bool,
) -> None:
    asked: list[int] = []

    def decode(token_id: int) -> str:
        asked.append(token_id)
        return chr(token_id)

    consumer = Consumer(logprobs=0, flat_logprobs=flat)
    consumer.stream.begin("prompt", [1, 2], None, decode=decode)
    [completion] = consumer.stream.completions
    taken = []
    for position, token in enumerate("abc"):
        completion.push_logprobs(rows(position, [(token, -1.0)]))
        consumer.push(token)
        taken.append((await consumer.take()).logprobs or [])
    assert [len(logprobs) for logprobs in taken] == [1, 2, 3]
    assert list(taken[2])[:2] == list(taken[1])
    if not flat:  # numbers need not be kept: they are cheap, objects are not
        assert asked == ids("abc")


async def test_logprobs_end_with_the_token_that_completed_a_stop_string() -> None:
    consumer = Consumer(logprobs=0, stop=["b"])
    [completion] = consumer.stream.completions
    completion.push_logprobs(rows(0, [("a", -1.0)], [("b", -2.0)], [("c", -4.0)]))
    assert consumer.push("abc")
    output = await consumer.take()
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 2
    assert output.cumulative_logprob == -3.0


async def test_rows_that_came_before_are_dropped_and_a_gap_is_noticed() -> None:
    consumer = Consumer(logprobs=0)
    [completion] = consumer.stream.completions
    assert completion.push_logprobs(rows(0, [("a", -1.0)], [("b", -2.0)]))
    assert completion.push_logprobs(rows(1, [("b", -2.0)], [("c", -4.0)]))
    assert not completion.push_logprobs(rows(4, [("e", -1.0)]))
    consumer.push("abc")
    assert (await consumer.take()).cumulative_logprob == -7.0


async def test_scores_by_id_have_no_rank_and_text_is_given_where_there_is_a_tokenizer() -> None:
    consumer = Consumer(logprobs=1, logprob_token_ids=ids("z"))
    consumer.stream.begin("prompt", [1, 2], None, decode=lambda token_id: f"<{chr(token_id)}>")
    [completion] = consumer.stream.completions
    completion.push_logprobs(rows(0, [("a", -1.0), ("b", -0.5), ("z", -9.0)], rank=2))
    consumer.push("a")
    [entries] = (await consumer.take()).logprobs or []
    assert entries == {
        ord("a"): Logprob(-1.0, 2, "<a>"),
        ord("b"): Logprob(-0.5, 1, "<b>"),
        ord("z"): Logprob(-9.0, None, "<z>"),
    }


async def test_flat_logprobs_read_like_the_others() -> None:
    outputs = []
    for flat in (False, True):
        consumer = Consumer(logprobs=1, flat_logprobs=flat)
        [completion] = consumer.stream.completions
        completion.push_logprobs(rows(0, [("a", -1.5), ("b", -0.5)], [("b", -0.5), ("a", -1.0)]))
        consumer.push("ab")
        outputs.append((await consumer.take()).logprobs)
    plain, flattened = outputs
    assert isinstance(flattened, FlatLogprobs) and flattened is not plain
    assert list(flattened) == plain and flattened[1:] is not None
    assert list(flattened[1:]) == plain[1:] and flattened[-1] == plain[-1]
    assert flattened.token_ids == ids("abba") and flattened.logprobs == [-1.5, -0.5, -0.5, -1.0]
    assert (flattened.start_indices, flattened.end_indices) == ([0, 2], [2, 4])


@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_prompt_logprobs_come_with_the_first_output_and_stay_unless_deltas_are_wanted(
    kind: RequestOutputKind,
) -> None:
    consumer = Consumer(prompt_logprobs=0, output_kind=kind)
    assert consumer.stream.push_prompt_logprobs(rows(1, [("b", -2.0)]))
    assert not consumer.stream.push_prompt_logprobs(rows(3, [("d", -2.0)]))
    consumer.push("x")
    taken = []
    if kind is not FINAL_ONLY:
        taken.append((await outputs_now(consumer.stream)).prompt_logprobs)
    consumer.finish()
    taken.append((await outputs_now(consumer.stream)).prompt_logprobs)
    scored = [None, {ord("b"): Logprob(-2.0, 1, None)}]
    assert taken == {DELTA: [scored, None], FINAL_ONLY: [scored]}.get(kind, [scored, scored])
