"""One stream, pushed by hand: what its consumer sees, and when."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from footplate.frontend import CompletionOutput, RequestMetrics, RequestOutputKind, SamplingParams
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings
from footplate.protocol.errors import EngineDeadError, RequestFailedError
from footplate.protocol.messages import Finished, FinishReason, Started

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Characters:
    """A detokenizer to which a token id is a code point."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def finish(self) -> str:
        return "~"  # what a real one shows for an unfinished character


def ids(text: str) -> list[int]:
    return [ord(char) for char in text]


class Consumer:
    """A stream, what its owner was told, and a shorthand for pushing and taking."""

    def __init__(self, **params: Any) -> None:
        self.abandoned: list[RequestStream] = []
        given = SamplingParams(**params)
        stops = given.stop_strings
        self.stream = RequestStream(
            "r1", 7, given, 5, RequestMetrics(1.0, 2.0), self.abandoned.append
        )
        self.stream.begin(
            "prompt",
            [1, 2],
            Characters() if given.detokenize else None,
            StopStrings(stops, given.include_stop_str_in_output) if stops else None,
        )

    def push(self, text: str, now: float = 3.0) -> bool:
        return self.stream.push(ids(text), now)

    def finish(self, reason: FinishReason = FinishReason.LENGTH, message: str = "") -> None:
        self.stream.finish(Finished(7, reason, message))

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
    consumer.finish(FinishReason.ERROR, "NaN logits")
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


async def test_an_aborted_stream_releases_the_text_it_held_back() -> None:
    consumer = Consumer(stop=["END"])
    consumer.push("abE")
    consumer.stream.abort()
    (only,) = await consumer.rest()
    assert (only.text, only.finish_reason) == ("abE~", "abort")
