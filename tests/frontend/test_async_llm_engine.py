"""All that the client object offers, over a real engine core with the fake model."""

import asyncio
import gc
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import uvloop

from footplate.frontend import (
    AsyncLLMEngine,
    EngineArgs,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from footplate.protocol.errors import (
    DuplicateRequestError,
    EngineClosedError,
    EngineDeadError,
    EngineStartError,
    InvalidParameterError,
    InvalidRequestError,
    MessageTooLargeError,
    PromptTooLongError,
    TokenizerError,
)
from footplate.protocol.messages import Stats

from .fake_model import NUM_SPECIAL, VOCAB_SIZE, expected_token_ids

T = TypeVar("T")
PROMPT = [20, 21, 22]
PATIENCE_S = 10.0
FOREVER = 500_000  # tokens, about ten seconds: longer than any pause of the test
FAKE = EngineArgs(model="fake", max_model_len=1_000_000)

pytestmark = pytest.mark.usefixtures("nothing_is_lost")


def tokens(**params: Any) -> SamplingParams:
    """Parameters of a request for token ids alone."""
    return SamplingParams(detokenize=False, **params)


async def last_of(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    async with asyncio.timeout(PATIENCE_S):
        async for output in outputs:
            last = output
    return last


async def is_idle(engine: AsyncLLMEngine) -> bool:
    """Whether the core holds nothing. It hears this question after all that was said before."""
    stats = await engine.get_stats()
    num_blocks = (await engine.get_scheduler_config()).num_kv_blocks
    held = (stats.num_running, stats.num_waiting, num_blocks - stats.num_free_blocks)
    return held == (0, 0, 0)


async def stats_when(engine: AsyncLLMEngine, condition: Callable[[Stats], bool]) -> Stats:
    """Ask the core again and again until its books meet a condition."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(stats := await engine.get_stats()):
            pass
    return stats


def is_gone_in_time(process_id: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(process_id) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not psutil.pid_exists(process_id)


# ---- tokens, seeds, ends


async def test_a_request_gets_the_models_tokens_in_order(engine: AsyncLLMEngine) -> None:
    seen = [output async for output in engine.generate(PROMPT, tokens(max_tokens=20, seed=7))]
    expected = expected_token_ids(PROMPT, 20, seed=7)
    for output in seen:
        held = output.outputs[0].token_ids
        assert held == expected[: len(held)]
        assert (output.prompt, output.prompt_token_ids) == (None, PROMPT)
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1].outputs[0].token_ids == expected
    assert seen[-1].outputs[0].finish_reason == "length"


async def test_greedy_output_depends_on_no_seed(engine: AsyncLLMEngine) -> None:
    for seed in (None, 1):
        output = await last_of(engine.generate(PROMPT, tokens(temperature=0, seed=seed)))
        assert output.outputs[0].token_ids == expected_token_ids(PROMPT, 16, temperature=0)


async def test_a_drawn_seed_is_reported_and_gives_the_same_output_again(
    engine: AsyncLLMEngine,
) -> None:
    first, second = [await last_of(engine.generate(PROMPT, tokens())) for _ in range(2)]
    assert first.seed != second.seed
    again = await last_of(engine.generate(PROMPT, tokens(seed=first.seed)))
    assert again.seed == first.seed
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    assert first.outputs[0].token_ids == expected_token_ids(PROMPT, 16, seed=first.seed)


async def test_without_max_tokens_the_context_window_is_filled() -> None:
    async with AsyncLLMEngine(EngineArgs(model="fake", max_model_len=50)) as engine:
        output = await last_of(engine.generate(PROMPT, tokens(max_tokens=None)))
        assert len(output.outputs[0].token_ids) == 50 - len(PROMPT)
        assert output.outputs[0].finish_reason == "length"


async def test_a_stop_token_ends_a_request_and_min_tokens_put_it_off(
    engine: AsyncLLMEngine,
) -> None:
    third = expected_token_ids(PROMPT, 3)[2]
    stopping = tokens(seed=0, stop_token_ids=[third])
    output = (await last_of(engine.generate(PROMPT, stopping))).outputs[0]
    assert (output.token_ids[-1], output.finish_reason, output.stop_reason) == (
        third,
        "stop",
        third,
    )
    assert len(output.token_ids) == 3
    later = tokens(seed=0, stop_token_ids=[third], min_tokens=16)
    output = (await last_of(engine.generate(PROMPT, later))).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (16, "length")


async def test_metrics_are_filled_in(engine: AsyncLLMEngine) -> None:
    before = time.time(), time.monotonic()
    output = await last_of(engine.generate(PROMPT, tokens()))
    after = time.time(), time.monotonic()
    metrics = output.metrics
    assert before[0] <= metrics.arrival_time <= after[0]
    assert metrics.first_token is not None and metrics.last_token is not None
    assert before[1] <= metrics.arrival <= metrics.first_token <= metrics.last_token <= after[1]
    assert metrics.queue_time_s is not None and metrics.prefill_time_s is not None
    assert metrics.time_to_first_token_s == metrics.first_token - metrics.arrival
    assert 0 <= metrics.queue_time_s + metrics.prefill_time_s <= metrics.time_to_first_token_s


# ---- output kinds, slow readers


async def test_the_three_output_kinds_tell_the_same_story(engine: AsyncLLMEngine) -> None:
    cumulative, delta, final = [
        [o async for o in engine.generate(PROMPT, tokens(seed=1, output_kind=kind))]
        for kind in RequestOutputKind
    ]
    expected = expected_token_ids(PROMPT, 16, seed=1)
    assert cumulative[-1].outputs[0].token_ids == expected
    assert [t for output in delta for t in output.outputs[0].token_ids] == expected
    assert [output.outputs[0].token_ids for output in final] == [expected]
    for outputs in (cumulative, delta, final):
        assert outputs[-1].finished
        assert outputs[-1].num_cached_tokens == 0


@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_a_reader_that_comes_late_gets_one_merged_output(
    engine: AsyncLLMEngine, kind: RequestOutputKind
) -> None:
    stream = await engine.add_request(
        None, PROMPT, tokens(seed=1, max_tokens=500, output_kind=kind)
    )
    # Outputs and answers come by the same socket: when this is answered, all tokens are here.
    await stats_when(engine, lambda stats: not stats.num_running and not stats.num_waiting)
    (only,) = [output async for output in stream]
    assert only.outputs[0].token_ids == expected_token_ids(PROMPT, 500, seed=1)


# ---- text


def text_params(**params: Any) -> SamplingParams:
    return SamplingParams(seed=3, max_tokens=40, **params)


async def full_text(engine: AsyncLLMEngine) -> tuple[list[str], str]:
    """What `text_params` produce for "Hi": the text of every token, and of all of them."""
    tokenizer = await engine.get_tokenizer()
    token_ids = expected_token_ids(tokenizer.encode("Hi"), 40, seed=3)
    return [tokenizer.decode([token_id]) for token_id in token_ids], tokenizer.decode(token_ids)


async def test_text_goes_in_and_comes_out(engine: AsyncLLMEngine) -> None:
    _, expected = await full_text(engine)
    output = await last_of(engine.generate("Hi", text_params()))
    assert (output.prompt, output.outputs[0].text) == ("Hi", expected)
    deltas = [
        output.outputs[0].text
        async for output in engine.generate("Hi", text_params(output_kind=RequestOutputKind.DELTA))
    ]
    assert "".join(deltas) == expected


async def test_a_long_prompt_and_a_conversation_are_prompts_too(engine: AsyncLLMEngine) -> None:
    tokenizer = await engine.get_tokenizer()
    long = "all aboard " * 100
    output = await last_of(engine.generate(long, text_params()))
    assert output.prompt_token_ids == tokenizer.encode(long)
    output = await last_of(engine.generate([{"role": "user", "content": "Hi"}], text_params()))
    assert output.prompt == "user: Hi\n"
    assert output.prompt_token_ids == tokenizer.encode("user: Hi\n")


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_that_two_tokens_share_ends_the_request_in_the_core(
    engine: AsyncLLMEngine, include: bool
) -> None:
    pieces, text = await full_text(engine)
    at = next(n for n in range(20, 39) if pieces[n].isalpha() and pieces[n + 1].isalpha())
    before, stop = "".join(pieces[: at + 1])[:-1], pieces[at][-1] + pieces[at + 1][0]
    assert text.index(stop) == len(before), "the stop string occurs earlier: take another seed"
    stats = await engine.get_stats()
    params = SamplingParams(
        seed=3, max_tokens=FOREVER, stop=["never", stop], include_stop_str_in_output=include
    )
    output = (await last_of(engine.generate("Hi", params))).outputs[0]
    assert output.text == before + (stop if include else "")
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.token_ids) == at + 2
    await stats_when(engine, lambda stats: not stats.num_running)
    produced = (await engine.get_stats()).num_generation_tokens - stats.num_generation_tokens
    assert produced < FOREVER


async def test_special_tokens_in_the_output_are_left_out_of_the_text(
    engine: AsyncLLMEngine,
) -> None:
    assert (await engine.get_tokenizer()).vocab_size == VOCAB_SIZE
    assert min(expected_token_ids(PROMPT, 500)) >= NUM_SPECIAL


async def test_a_model_without_tokenizer_serves_token_ids(
    core_address: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    async with AsyncLLMEngine.connect(core_address, tokenizer=str(tmp_path)) as engine:
        await last_of(engine.generate(PROMPT, tokens()))
        for prompt, params in ((PROMPT, SamplingParams()), ("Hi", tokens())):
            with pytest.raises(TokenizerError, match=str(tmp_path)):
                await last_of(engine.generate(prompt, params))
        assert await is_idle(engine)


# ---- refusals


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], {}, InvalidRequestError, "empty"),
        ([20] * 50, {}, PromptTooLongError, "50 tokens.*limit is 50.*at least 1,"),
        ([20] * 70, {}, PromptTooLongError, "70 tokens.*limit is 50.*at least 21,"),
        ([20] * 40, {"max_tokens": 11}, PromptTooLongError, "together 51.*50.*to 10,"),
        ([20, VOCAB_SIZE], {}, InvalidRequestError, f"{VOCAB_SIZE} .*0 to {VOCAB_SIZE - 1}"),
        ([-1], {}, InvalidRequestError, "-1 "),
        ([1.5], {}, InvalidRequestError, "integers"),
        ({"prompt_token_ids": [20], "salt": "s"}, {}, InvalidRequestError, "salt"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_numbers_and_never_sent(
    small_engine: AsyncLLMEngine, prompt: Any, params: Any, error: type[Exception], words: str
) -> None:
    before = await small_engine.get_stats()
    with pytest.raises(error, match=words):
        await anext(small_engine.generate(prompt, tokens(**params)))
    assert await small_engine.get_stats() == before


async def test_what_just_fits_is_served(small_engine: AsyncLLMEngine) -> None:
    for length, max_tokens in ((49, 1), (40, 10), (1, 49)):
        output = await last_of(small_engine.generate([20] * length, tokens(max_tokens=max_tokens)))
        assert len(output.outputs[0].token_ids) == max_tokens


# ---- ids, aborts, leaving early


async def test_a_live_id_is_refused_and_its_request_goes_on(engine: AsyncLLMEngine) -> None:
    stream = await engine.add_request("a", PROMPT, tokens(max_tokens=FOREVER))
    with pytest.raises(DuplicateRequestError, match="'a'"):
        await engine.add_request("a", PROMPT, tokens())
    await anext(stream)
    await engine.abort("a")
    output = await last_of(engine.generate(PROMPT, tokens(), "a"))
    assert output.request_id == "a", "an id is free again when its request has ended"


async def test_of_two_requests_with_one_id_in_one_turn_one_is_refused(
    engine: AsyncLLMEngine,
) -> None:
    outcomes = await asyncio.gather(
        *(engine.add_request("a", "Hi", SamplingParams()) for _ in range(2)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes].count(DuplicateRequestError) == 1
    await engine.abort("a")


async def test_an_id_is_made_up_if_none_is_given(engine: AsyncLLMEngine) -> None:
    first, second = [await last_of(engine.generate(PROMPT, tokens())) for _ in range(2)]
    assert first.request_id != second.request_id


async def until_ended_early(engine: AsyncLLMEngine, before: Stats) -> None:
    """Wait until nothing runs, which must not be because a request came to its own end."""
    stats = await stats_when(engine, lambda stats: not stats.num_running + stats.num_waiting)
    assert stats.num_generation_tokens - before.num_generation_tokens < FOREVER
    assert await is_idle(engine)


async def test_an_aborted_request_ends_with_what_there_is(engine: AsyncLLMEngine) -> None:
    before = await engine.get_stats()
    stream = await engine.add_request("a", PROMPT, tokens(max_tokens=FOREVER, seed=1))
    await anext(stream)
    await engine.abort("a")
    last = [output async for output in stream][-1].outputs[0]
    assert last.finish_reason == "abort"
    num_tokens = len(last.token_ids)
    assert last.token_ids == expected_token_ids(PROMPT, num_tokens, seed=1)
    await until_ended_early(engine, before)


@pytest.mark.parametrize("nonsense", [None, 5, [None], ["a", 5], [["a"]]])
async def test_what_is_no_id_cannot_be_aborted(engine: AsyncLLMEngine, nonsense: Any) -> None:
    stream = await engine.add_request("a", PROMPT, tokens(max_tokens=FOREVER))
    with pytest.raises(InvalidParameterError, match="request_id="):
        await engine.abort(nonsense)
    assert not stream.is_finished
    stream.close()


async def test_aborting_wakes_the_consumer_that_waits(engine: AsyncLLMEngine) -> None:
    final = tokens(max_tokens=FOREVER, output_kind=RequestOutputKind.FINAL_ONLY)
    waiting = asyncio.create_task(last_of(engine.generate(PROMPT, final, "a")))
    before = await stats_when(engine, lambda stats: stats.num_running == 1)
    await engine.abort("a")
    assert (await waiting).outputs[0].finish_reason == "abort"
    await until_ended_early(engine, before)


async def test_many_are_aborted_at_once_and_unknown_ids_are_no_error(
    engine: AsyncLLMEngine,
) -> None:
    before = await engine.get_stats()
    streams = [
        await engine.add_request(str(n), PROMPT, tokens(max_tokens=FOREVER)) for n in range(20)
    ]
    await last_of(engine.generate(PROMPT, tokens(), "finished"))
    await engine.abort(["unknown", "finished", *map(str, range(19)), "3"])
    await engine.abort("unknown")
    await engine.abort([])
    for stream in streams[:19]:
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
    assert not streams[19].is_finished
    await engine.abort("19")
    await until_ended_early(engine, before)


async def test_a_request_may_be_aborted_before_its_first_token(engine: AsyncLLMEngine) -> None:
    stream = await engine.add_request("a", PROMPT, tokens(max_tokens=FOREVER))
    await engine.abort("a")
    (only,) = [output async for output in stream]
    assert (only.outputs[0].token_ids, only.outputs[0].finish_reason) == ([], "abort")
    assert await is_idle(engine)


async def test_an_abort_that_comes_while_the_prompt_is_encoded_is_not_lost(
    engine: AsyncLLMEngine,
) -> None:
    before = await engine.get_stats()
    long = tokens(max_tokens=FOREVER)
    adding = asyncio.create_task(engine.add_request("a", "word " * 5_000, long))
    await asyncio.sleep(0)
    with pytest.raises(DuplicateRequestError):
        await engine.add_request("a", PROMPT, tokens())
    await engine.abort("a")
    (only,) = [output async for output in await adding]
    assert only.outputs[0].finish_reason == "abort"
    assert (await engine.get_stats()).num_prompt_tokens == before.num_prompt_tokens


@pytest.mark.parametrize("illegal", [5, "", b"a"])
async def test_a_request_id_that_is_no_string_is_refused(
    engine: AsyncLLMEngine, illegal: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        await engine.add_request(illegal, PROMPT, tokens())


async def test_params_that_are_no_sampling_params_are_refused(engine: AsyncLLMEngine) -> None:
    params: Any = {"max_tokens": 3}
    with pytest.raises(InvalidRequestError, match="SamplingParams, got dict"):
        await engine.add_request(None, PROMPT, params)


async def break_out(generator: AsyncGenerator[RequestOutput, None]) -> None:
    async for _ in generator:
        break


async def close_it(generator: AsyncGenerator[RequestOutput, None]) -> None:
    async with aclosing(generator):
        await anext(generator)


async def cancel_its_task(generator: AsyncGenerator[RequestOutput, None]) -> None:
    first = asyncio.Event()

    async def consume() -> None:
        async for _ in generator:
            first.set()

    task = asyncio.create_task(consume())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_out(generator: AsyncGenerator[RequestOutput, None]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            async for _ in generator:
                pass


async def raise_inside(generator: AsyncGenerator[RequestOutput, None]) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in generator:
            _ = 1 / 0


@pytest.mark.parametrize(
    "leave",
    [break_out, close_it, cancel_its_task, time_out, raise_inside],
    ids=lambda f: f.__name__,
)
async def test_whoever_leaves_a_request_aborts_it_in_the_core(
    engine: AsyncLLMEngine,
    leave: Callable[[AsyncGenerator[RequestOutput, None]], Awaitable[None]],
) -> None:
    before = await engine.get_stats()
    await leave(engine.generate(PROMPT, tokens(max_tokens=FOREVER)))
    gc.collect()
    await until_ended_early(engine, before)


async def test_closing_a_stream_aborts_its_request(engine: AsyncLLMEngine) -> None:
    before = await engine.get_stats()
    stream = await engine.add_request(None, PROMPT, tokens(max_tokens=FOREVER))
    await stream.aclose()
    assert [output async for output in stream] == []
    await until_ended_early(engine, before)


async def test_a_generator_that_nobody_iterates_asks_for_nothing(engine: AsyncLLMEngine) -> None:
    before = await engine.get_stats()
    del_me = engine.generate(PROMPT, tokens(max_tokens=FOREVER))
    del del_me
    assert await engine.get_stats() == before


class CancelledAt:
    """Awaits a coroutine, and cancels the task it runs in at its k-th suspension."""

    def __init__(self, suspension: int, coroutine: Generator[Any, Any, T]) -> None:
        self._suspension = suspension
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        resume: Callable[[Any], Any] = self._coroutine.send
        argument: Any = None
        for suspension in count(1):
            try:
                awaited = resume(argument)
            except StopIteration as stop:
                return stop.value
            if suspension == self._suspension:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                argument = yield awaited
                resume = self._coroutine.send
            except BaseException as error:
                argument = error
                resume = self._coroutine.throw
        return None


@pytest.mark.parametrize("how", ["generate", "add_request"])
async def test_cancelled_at_any_await_a_request_leaves_nothing_behind(
    core_address: str, how: str
) -> None:
    # Text, so that the tokenizer is loaded and used on its thread; long, so that one suspension
    # after the other is reached before the request ends.
    prompt, params = "all aboard " * 100, SamplingParams(max_tokens=FOREVER)

    async def ask(engine: AsyncLLMEngine) -> None:
        if how == "generate":
            outputs = engine.generate(prompt, params)
        else:
            stream = await engine.add_request(None, prompt, params)
            outputs = stream  # type: ignore[assignment]
        async with aclosing(outputs):
            for _ in range(3):
                await anext(outputs)

    async def run(suspension: int, engine: AsyncLLMEngine) -> None:
        await CancelledAt(suspension, ask(engine))  # type: ignore[arg-type]

    for suspension in count(1):
        engine = AsyncLLMEngine.connect(core_address)
        before = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                await run(suspension, engine)
        except asyncio.CancelledError:
            pass
        else:
            break
        finally:
            before = await engine.get_stats()
            await until_ended_early(engine, before)
            engine.shutdown()
    assert suspension > 5, "start, tokenizer, encoding and three outputs are awaited"


# ---- many


async def test_two_thousand_streams_at_once_all_get_their_own_tokens(
    engine: AsyncLLMEngine,
) -> None:
    async def ask(number: int) -> None:
        prompt = [20 + number % 500, 20 + number // 500]
        output = await last_of(engine.generate(prompt, tokens(seed=number, max_tokens=8)))
        assert output.outputs[0].token_ids == expected_token_ids(prompt, 8, seed=number)

    await asyncio.gather(*(ask(number) for number in range(2000)))


async def test_two_thousand_streams_that_are_cancelled_at_once_leave_nothing(
    engine: AsyncLLMEngine,
) -> None:
    asks = [
        asyncio.create_task(
            last_of(engine.generate([20 + number % 500], tokens(max_tokens=FOREVER)))
        )
        for number in range(2000)
    ]
    await stats_when(engine, lambda stats: stats.num_running > 0)
    for task in asks:
        task.cancel()
    await asyncio.wait(asks)
    assert all(task.cancelled() for task in asks)
    assert await is_idle(engine)


# ---- prefix cache, priorities, facts


async def test_a_prompt_that_was_used_before_is_found_in_the_prefix_cache(
    engine: AsyncLLMEngine,
) -> None:
    prompt = list(range(100, 164))  # four blocks; at least one token is computed again
    assert await engine.reset_prefix_cache()
    for prompt_given, num_cached in (
        (prompt, 0),
        (prompt, 48),
        ({"prompt_token_ids": prompt, "cache_salt": "s"}, 0),
        ({"prompt_token_ids": prompt, "cache_salt": "s"}, 48),
        (prompt[:40], 32),
    ):
        output = await last_of(engine.generate(prompt_given, tokens(seed=1)))
        assert output.num_cached_tokens == num_cached
        assert output.outputs[0].token_ids == expected_token_ids(
            output.prompt_token_ids, 16, seed=1
        )
    assert (await engine.get_stats()).num_cached_blocks > 0
    assert await engine.reset_prefix_cache()
    assert (await engine.get_stats()).num_cached_blocks == 0
    assert (await last_of(engine.generate(prompt, tokens()))).num_cached_tokens == 0


async def test_the_prefix_cache_is_not_reset_under_a_running_request(
    engine: AsyncLLMEngine,
) -> None:
    stream = await engine.add_request(None, PROMPT, tokens(max_tokens=FOREVER))
    await anext(stream)
    assert not await engine.reset_prefix_cache()
    stream.close()
    assert await engine.reset_prefix_cache()


async def test_lower_priorities_run_first() -> None:
    one_at_a_time = replace(FAKE, max_num_seqs=1, scheduling_policy="priority")
    async with AsyncLLMEngine(one_at_a_time) as engine:
        running = await engine.add_request("running", PROMPT, tokens(max_tokens=FOREVER))
        await anext(running)
        late, soon = [
            asyncio.create_task(last_of(engine.generate(PROMPT, tokens(), priority=priority)))
            for priority in (2, 1)
        ]
        urgent = await last_of(engine.generate(PROMPT, tokens(), priority=-1))
        assert urgent.finished and not running.is_finished
        running.close()
        finished = [(await task).metrics.last_token for task in (soon, late)]
        assert finished == sorted(finished, key=lambda moment: moment or 0)
        for illegal in (2**31, -(2**31) - 1):
            with pytest.raises(InvalidRequestError, match="2147483647"):
                await last_of(engine.generate(PROMPT, tokens(), priority=illegal))


async def test_priorities_need_the_priority_policy(engine: AsyncLLMEngine) -> None:
    with pytest.raises(InvalidRequestError, match="scheduling_policy='priority'"):
        await last_of(engine.generate(PROMPT, tokens(), priority=1))


async def test_the_core_owns_the_facts(tokenizer_folder: Path) -> None:
    args = EngineArgs(
        model="fake",
        tokenizer=str(tokenizer_folder),
        max_model_len=64,
        block_size=8,
        num_gpu_blocks_override=20,
        max_num_seqs=3,
        max_num_batched_tokens=30,
        enable_prefix_caching=False,
    )
    progress: list[tuple[str, float]] = []
    engine = AsyncLLMEngine.from_engine_args(args, on_progress=lambda *step: progress.append(step))
    assert engine.process_id is None
    with pytest.raises(EngineClosedError, match="not been started"):
        _ = engine.start_phases
    async with engine:
        model, limits = await engine.get_model_config(), await engine.get_scheduler_config()
        assert (model.model, model.vocab_size, model.max_model_len) == ("fake", VOCAB_SIZE, 64)
        assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (3, 30)
        assert (limits.block_size, limits.num_kv_blocks) == (8, 20)
        assert (limits.policy, limits.enable_prefix_caching) == ("fcfs", False)
        assert engine.process_id is not None and psutil.pid_exists(engine.process_id)
        assert all(seconds >= 0 for seconds in engine.start_phases.values())
        assert all(0 <= fraction <= 1 for _, fraction in progress)
        assert (await engine.get_tokenizer()).vocab_size == VOCAB_SIZE


async def test_more_than_fits_is_preempted_and_changes_no_token() -> None:
    tight = EngineArgs(model="fake", max_model_len=64, block_size=4, num_gpu_blocks_override=24)
    async with AsyncLLMEngine(tight) as engine:
        prompts = [[20 + number] * 10 for number in range(12)]
        outputs = await asyncio.gather(
            *(last_of(engine.generate(prompt, tokens(max_tokens=40, seed=1))) for prompt in prompts)
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == expected_token_ids(prompt, 40, seed=1)
        assert (await engine.get_stats()).num_preemptions > 0
        assert await is_idle(engine)


# ---- the life of an engine


def own_children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def state_of(engine: AsyncLLMEngine) -> tuple[bool, bool, bool]:
    return engine.is_running, engine.is_stopped, engine.errored


async def test_an_engine_tells_where_it_is_in_its_life() -> None:
    engine = AsyncLLMEngine(FAKE)
    assert state_of(engine) == (False, False, False)
    with pytest.raises(EngineClosedError, match="not been started"):
        await engine.check_health()
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    assert state_of(engine) == (False, False, False)
    with pytest.raises(EngineClosedError, match="starting"):
        await engine.check_health()
    await starting
    assert state_of(engine) == (True, False, False)
    assert isinstance(engine.dead_error, EngineDeadError), "what a request would be answered with"
    await engine.check_health()
    engine.shutdown()
    assert state_of(engine) == (False, True, False)
    with pytest.raises(EngineClosedError, match="shut down"):
        await engine.check_health()


def test_an_engine_is_constructed_without_a_loop_and_starts_at_its_first_request() -> None:
    engine = AsyncLLMEngine(FAKE)
    before = own_children()

    async def ask() -> None:
        output = await last_of(engine.generate(PROMPT, tokens(seed=1)))
        assert output.outputs[0].token_ids == expected_token_ids(PROMPT, 16, seed=1)
        assert len(own_children() - before) == 1
        engine.shutdown()

    asyncio.run(ask())
    assert own_children() == before


async def test_starting_twice_and_at_the_same_time_starts_one_core() -> None:
    before = own_children()
    async with AsyncLLMEngine(FAKE) as engine:
        await engine.start()
        assert len(own_children() - before) == 1
    engine = AsyncLLMEngine(FAKE)
    asks = (last_of(engine.generate(PROMPT, tokens())) for _ in range(10))
    await asyncio.gather(engine.start(), engine.start(), *asks)
    assert len(own_children() - before) == 1
    engine.shutdown()
    assert own_children() == before


async def test_a_request_that_gives_up_does_not_stop_the_start_it_waited_for() -> None:
    engine = AsyncLLMEngine(FAKE)
    impatient = asyncio.create_task(last_of(engine.generate(PROMPT, tokens())))
    await asyncio.sleep(0)
    patient = asyncio.create_task(last_of(engine.generate(PROMPT, tokens())))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).finished
    with pytest.raises(asyncio.CancelledError):
        await impatient
    engine.shutdown()


async def test_the_background_loop_of_vllm_is_this_engine() -> None:
    engine = AsyncLLMEngine(FAKE)
    engine.start_background_loop()
    with pytest.raises(RuntimeError, match="running already"):
        engine.start_background_loop()
    await engine.start()
    assert engine.is_running
    with pytest.raises(RuntimeError, match="running already"):
        engine.start_background_loop()
    engine.shutdown_background_loop()
    assert engine.is_stopped


async def test_shutting_down_ends_every_stream_and_call_and_the_core() -> None:
    before = own_children()
    engine = AsyncLLMEngine(FAKE)
    waiting = asyncio.create_task(
        last_of(
            engine.generate(
                PROMPT, tokens(max_tokens=FOREVER, output_kind=RequestOutputKind.FINAL_ONLY)
            )
        )
    )
    stream = await engine.add_request(None, PROMPT, tokens(max_tokens=FOREVER))
    await anext(stream)
    calling = asyncio.create_task(engine.get_stats())
    await asyncio.sleep(0)
    engine.shutdown()
    engine.shutdown()
    assert own_children() == before
    for ending in (waiting, calling):
        with pytest.raises(EngineClosedError):
            await ending
    with pytest.raises(EngineClosedError):
        async for _ in stream:
            pass
    # What comes too late does not bring the engine back.
    await engine.abort("anything")
    for late in (engine.add_request(None, PROMPT, tokens()), engine.get_stats()):
        with pytest.raises(EngineClosedError, match="shut down"):
            await late
    assert own_children() == before


async def test_an_engine_can_be_started_again_after_its_shutdown(tokenizer_folder: Path) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake", tokenizer=str(tokenizer_folder)))
    processes = set()
    for _ in range(2):
        await engine.start()
        assert state_of(engine) == (True, False, False)
        assert (await last_of(engine.generate("Hi", SamplingParams()))).outputs[0].text
        processes.add(engine.process_id)
        engine.shutdown()
        assert state_of(engine) == (False, True, False)
    assert len(processes) == 2


def test_an_engine_can_be_used_from_one_loop_after_the_other(tokenizer_folder: Path) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake", tokenizer=str(tokenizer_folder)))

    async def ask() -> None:
        async with engine:
            assert (await last_of(engine.generate("Hi", SamplingParams()))).outputs[0].text

    for _ in range(2):
        asyncio.run(ask())


@pytest.mark.parametrize("num_turns", range(4))
async def test_an_engine_can_be_shut_down_while_it_starts(num_turns: int) -> None:
    before = own_children()
    engine = AsyncLLMEngine(FAKE)
    starting = asyncio.gather(*(asyncio.ensure_future(engine.start()) for _ in range(2)))
    await asyncio.sleep(0)  # both wait for one start, which has not had its first turn
    for _ in range(num_turns):
        await asyncio.sleep(0)
    engine.shutdown()
    assert state_of(engine) == (False, True, False)
    with pytest.raises(EngineClosedError, match="shut down while it was starting"):
        await starting
    assert state_of(engine) == (False, True, False)
    assert own_children() == before


async def test_an_engine_that_was_shut_down_while_it_started_can_be_started_at_once() -> None:
    engine = AsyncLLMEngine(FAKE)
    for num_turns in range(3):
        engine.start_background_loop()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        engine.shutdown()
    await engine.start()
    assert (await last_of(engine.generate(PROMPT, tokens()))).finished
    engine.shutdown()


async def test_shutting_down_an_engine_that_never_started_is_no_error() -> None:
    engine = AsyncLLMEngine(FAKE)
    engine.shutdown()
    assert engine.is_stopped


async def test_a_failed_start_is_told_to_everyone_and_remembered() -> None:
    before = own_children()
    engine = AsyncLLMEngine(EngineArgs(model="fake", max_model_len=99, num_gpu_blocks_override=1))
    asks = [engine.start(), last_of(engine.generate(PROMPT, tokens())), engine.get_stats()]
    outcomes = await asyncio.gather(*asks, return_exceptions=True)
    later = await asyncio.gather(engine.start(), engine.check_health(), return_exceptions=True)
    for outcome in (*outcomes, *later):
        assert isinstance(outcome, EngineStartError)
        assert "max_model_len=99 does not fit" in str(outcome)
    assert state_of(engine) == (False, True, True)
    assert engine.dead_error is outcomes[0]
    with pytest.raises(EngineStartError):
        engine.start_background_loop()
    assert own_children() == before


async def test_a_start_that_takes_too_long_is_ended() -> None:
    before = own_children()
    engine = AsyncLLMEngine(EngineArgs(model="fake", start_timeout_s=0.001))
    with pytest.raises(EngineStartError, match=r"within 0\.001 s"):
        await engine.start()
    assert own_children() == before


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_an_engine_that_nobody_launched_cannot_be_attached_to(tmp_path: Path) -> None:
    for address, words in (
        ("ipc:///nowhere/at/all/engine.sock", "no engine listens"),
        (f"ipc://{tmp_path}/engine.sock", "within"),
    ):
        engine = AsyncLLMEngine.connect(address, timeout_s=0.05)
        with pytest.raises(EngineStartError, match=words):
            await engine.start()
    with pytest.raises(InvalidParameterError, match="loopback"):
        await AsyncLLMEngine.connect("tcp://10.0.0.1:5555").start()
    assert files_in(tmp_path) == []


async def test_two_engines_in_one_process_are_two(tokenizer_folder: Path) -> None:
    async with AsyncLLMEngine(FAKE) as first, AsyncLLMEngine(FAKE) as second:
        assert first.process_id != second.process_id
        outputs = await asyncio.gather(
            *(last_of(engine.generate(PROMPT, tokens(seed=1), "a")) for engine in (first, second))
        )
        for output in outputs:
            assert output.outputs[0].token_ids == expected_token_ids(PROMPT, 16, seed=1)
        first.shutdown()
        assert (await last_of(second.generate(PROMPT, tokens()))).finished


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_it_runs_under_either_event_loop(
    new_event_loop: Callable[[], asyncio.AbstractEventLoop], tokenizer_folder: Path
) -> None:
    async def use() -> None:
        async with AsyncLLMEngine(replace(FAKE, tokenizer=str(tokenizer_folder))) as engine:
            outputs = await asyncio.gather(
                *(last_of(engine.generate("Hi", SamplingParams(seed=1))) for _ in range(50))
            )
            assert len({output.outputs[0].text for output in outputs}) == 1
            await break_out(engine.generate(PROMPT, tokens(max_tokens=FOREVER)))
            gc.collect()
            await until_ended_early(engine, await engine.get_stats())

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(use())


async def test_signal_handlers_are_the_applications_business() -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in signal.valid_signals()]

    before = handlers()
    async with AsyncLLMEngine(FAKE) as engine:
        await last_of(engine.generate(PROMPT, tokens()))
        assert handlers() == before
    assert handlers() == before


async def test_an_engine_that_is_dropped_ends_its_core() -> None:
    engine = AsyncLLMEngine(FAKE)
    await break_out(engine.generate(PROMPT, tokens(max_tokens=FOREVER)))
    process_id = engine.process_id
    assert process_id is not None
    del engine
    gc.collect()
    await asyncio.sleep(0)  # the generator is closed by the event loop
    gc.collect()
    assert await asyncio.to_thread(is_gone_in_time, process_id)


def test_an_engine_whose_loop_was_closed_ends_its_core_when_it_is_dropped() -> None:
    before = own_children()

    async def use() -> AsyncLLMEngine:
        engine = AsyncLLMEngine(FAKE)
        await engine.add_request(None, PROMPT, tokens(max_tokens=FOREVER))
        return engine

    engine = asyncio.run(use())
    assert len(own_children() - before) == 1
    del engine
    gc.collect()
    assert own_children() == before


def test_an_engine_whose_loop_was_closed_can_be_shut_down() -> None:
    before = own_children()

    async def use() -> AsyncLLMEngine:
        engine = AsyncLLMEngine(FAKE)
        await engine.add_request(None, PROMPT, tokens(max_tokens=FOREVER))
        return engine

    engine = asyncio.run(use())
    engine.shutdown()
    assert engine.is_stopped
    assert own_children() == before


async def test_a_message_too_large_for_the_link_is_refused_here(engine: AsyncLLMEngine) -> None:
    prompt = {"prompt_token_ids": PROMPT, "cache_salt": "x" * 2**25}
    with pytest.raises(MessageTooLargeError):
        await engine.add_request("a", prompt, tokens())
    assert (await last_of(engine.generate(PROMPT, tokens(), "a"))).finished
