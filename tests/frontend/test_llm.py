"""`LLM`: the same engine behind plain calls."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from footplate.frontend import LLM, RequestOutputKind, SamplingParams
from footplate.protocol.errors import (
    EngineClosedError,
    EngineStartError,
    InvalidParameterError,
    InvalidRequestError,
    PromptTooLongError,
)

from .fake_model import expected_token_ids

FOREVER = 30_000


def tokens(**params: Any) -> SamplingParams:
    return SamplingParams(detokenize=False, **params)


@pytest.fixture(scope="module")
def llm(tokenizer_folder: Path) -> Iterator[LLM]:
    with LLM(model="fake", tokenizer=str(tokenizer_folder)) as llm:
        yield llm


def generate(llm: LLM, *args: Any, **kwargs: Any) -> list[list[int]]:
    outputs = llm.generate(*args, use_tqdm=False, **kwargs)
    assert all(output.finished for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


# ---- forms of prompts and parameters


def test_results_stand_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[20 + number] for number in range(100)]
    params = [tokens(seed=number, max_tokens=1 + number % 30) for number in range(100)]
    assert generate(llm, prompts, params) == [
        expected_token_ids(prompt, 1 + number % 30, seed=number)
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("prompts", "each"),
    [
        ([20, 21], [[20, 21]]),
        ((20, 21), [[20, 21]]),
        ([[20, 21]], [[20, 21]]),
        ([[20], [21], (22,)], [[20], [21], [22]]),
        ({"prompt_token_ids": [20]}, [[20]]),
        ([{"prompt_token_ids": [20]}, [21]], [[20], [21]]),
        ([], []),
    ],
)
def test_one_prompt_and_lists_of_prompts_are_told_apart(
    llm: LLM, prompts: Any, each: list[list[int]]
) -> None:
    expected = [expected_token_ids(prompt, 5, seed=1) for prompt in each]
    assert generate(llm, prompts, tokens(seed=1, max_tokens=5)) == expected


def test_texts_and_conversations_are_prompts(llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=5)
    hi = {"role": "user", "content": "Hi"}
    ho = {"role": "user", "content": "Ho"}
    for prompts, texts in (
        ("Hi", ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([{"prompt": "Hi"}, "Ho"], ["Hi", "Ho"]),
        ([hi], ["user: Hi\n"]),
        ([[hi], [ho, hi]], ["user: Hi\n", "user: Ho\nuser: Hi\n"]),
    ):
        outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert [output.prompt for output in outputs] == texts
        assert all(output.outputs[0].text for output in outputs)
    (chat,) = llm.chat([hi], params, use_tqdm=False)
    assert chat.prompt == "user: Hi\n"


def test_defaults_are_the_defaults_of_sampling_params(llm: LLM) -> None:
    (output,) = llm.generate("Hi", use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_an_output_kind_makes_no_difference_to_the_result(llm: LLM) -> None:
    for kind in RequestOutputKind:
        params = tokens(seed=1, output_kind=kind)
        assert generate(llm, [20, 21], params) == [expected_token_ids([20, 21], 16, seed=1)]


def test_as_many_parameters_as_prompts_or_one_for_all(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts and 3 sampling params"):
        generate(llm, [[20], [21]], [tokens()] * 3)
    with pytest.raises(InvalidRequestError, match="1 prompts and 0 sampling params"):
        generate(llm, [[20]], [])


@pytest.mark.parametrize("given", [5, {"temperature": 0}, [None]])
def test_what_are_no_parameters_is_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be SamplingParams, got"):
        llm.generate([[20]], given, use_tqdm=False)


# ---- errors


def is_idle(llm: LLM) -> bool:
    stats = llm.get_stats()
    return not stats.num_running + stats.num_waiting


def test_the_first_refused_prompt_is_the_error_and_the_others_are_ended(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError, match="40000 tokens"):
        generate(llm, [[20], [20] * 40_000, [21]], tokens(max_tokens=FOREVER))
    assert is_idle(llm)
    assert len(generate(llm, [[20]], tokens())) == 1


@pytest.mark.parametrize("prompts", [None, 5, b"text", [None], [[20], 5], [1.5]])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError):
        generate(llm, prompts, tokens())


def test_an_engine_that_cannot_start_raises_and_leaves_no_thread() -> None:
    threads = set(threading.enumerate())
    children = len(psutil.Process().children())
    with pytest.raises(EngineStartError, match="max_model_len=99 does not fit"):
        LLM(model="fake", max_model_len=99, num_gpu_blocks_override=1)
    with pytest.raises(InvalidParameterError, match="block_size=0"):
        LLM(model="fake", block_size=0)
    with pytest.raises(TypeError, match="blocksize"):
        LLM(model="fake", blocksize=16)
    assert len(psutil.Process().children()) == children
    assert set(threading.enumerate()) <= threads


# ---- progress


def test_progress_is_shown_unless_switched_off(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([[20]] * 3, tokens(), use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    llm.generate([[20]] * 3, tokens())
    shown = capfd.readouterr()
    assert "3/3" in shown.err
    assert shown.out == ""


# ---- threads, control, the end


def test_threads_may_share_an_llm(llm: LLM) -> None:
    def ask(number: int) -> list[list[int]]:
        return generate(llm, [[20 + number]] * 3, tokens(seed=number))

    with ThreadPoolExecutor(8) as pool:
        for number, results in enumerate(pool.map(ask, range(24))):
            assert results == [expected_token_ids([20 + number], 16, seed=number)] * 3


def test_control_calls_are_plain_calls(llm: LLM) -> None:
    generate(llm, [list(range(20, 60))], tokens())
    assert llm.get_stats().num_cached_blocks > 0
    assert llm.reset_prefix_cache()
    assert llm.get_stats().num_cached_blocks == 0
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"


def test_shutting_down_twice_is_no_error_and_using_it_afterwards_is_one() -> None:
    children = len(psutil.Process().children())
    llm = LLM(model="fake")
    assert len(psutil.Process().children()) == children + 1
    llm.shutdown()
    llm.shutdown()
    assert len(psutil.Process().children()) == children
    for call in (lambda: generate(llm, [20], tokens()), llm.get_stats, llm.get_tokenizer):
        with pytest.raises(EngineClosedError, match="shut down"):
            call()


def test_shutting_down_ends_the_calls_of_other_threads() -> None:
    llm = LLM(model="fake")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, llm, [20], tokens(max_tokens=FOREVER))
        while is_idle(llm) and not running.done():
            pass
        llm.shutdown()
        with pytest.raises(EngineClosedError):
            running.result(timeout=5)


def test_an_llm_that_is_dropped_ends_its_core_and_its_thread() -> None:
    threads = set(threading.enumerate())
    children = len(psutil.Process().children())
    llm = LLM(model="fake")
    generate(llm, [20], tokens())
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert len(psutil.Process().children()) == children
    assert set(threading.enumerate()) <= threads


def test_an_llm_may_be_collected_on_its_own_thread() -> None:
    # Whichever thread allocates may run the collector, the thread of the event loop too.
    before = set(threading.enumerate())
    llm = LLM(model="fake")
    loop, own = llm._loop, set(threading.enumerate()) - before
    assert llm._thread in own
    cycle: list[Any] = [llm]
    cycle.append(cycle)
    del llm, cycle
    loop.call_soon_threadsafe(gc.collect)
    for thread in own:
        thread.join(timeout=5)
        assert not thread.is_alive(), thread


def test_priorities_are_one_for_all_or_one_for_each() -> None:
    with LLM(model="fake", scheduling_policy="priority", max_num_seqs=1) as llm:
        params = SamplingParams(max_tokens=200, detokenize=False)
        prompts = [{"prompt_token_ids": [20 + number]} for number in range(4)]
        done = [
            output.metrics.last_token
            for output in llm.generate(prompts, params, priority=[0, 3, 2, 1], use_tqdm=False)
        ]
        assert done[3] < done[2] < done[1]  # type: ignore[operator]
        llm.generate(prompts, params, priority=5, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="4 prompts and 3"):
            llm.generate(prompts, params, priority=[1, 2, 3], use_tqdm=False)
