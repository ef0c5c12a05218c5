"""What the user asks for, as the engine core is told it."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.frontend import SamplingParams
from footplate.frontend.text import Tokenizer, load_tokenizer
from footplate.frontend.token_params import needs_tokenizer, resolve_params
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.messages import ModelFacts
from footplate.protocol.params import RepetitionDetectionParams
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    ProcessorCall,
    RepetitionDetection,
    ThinkingBudget,
    TokenParams,
)

from .fake_model import VOCAB_SIZE, write_tokenizer

MODEL = ModelFacts("m", "t", "A", VOCAB_SIZE, 100, (2, 9), "float32", "cpu", "paged torch")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def resolve(
    requests: RequestConfig | None = None, tokenizer: Tokenizer | None = None, **params: Any
) -> TokenParams:
    given = SamplingParams(**params)
    assert needs_tokenizer(given) == (tokenizer is not None)
    resolved = resolve_params(
        given,
        seed=5,
        max_tokens=3,
        model=MODEL,
        requests=requests or RequestConfig(),
        tokenizer=tokenizer,
    )
    frame = msgspec.msgpack.encode(resolved)
    assert msgspec.msgpack.decode(frame, type=TokenParams) == resolved, "the core would refuse it"
    return resolved


def adjustments(**params: Any) -> LogitAdjustments:
    found = resolve(**params).adjustments
    assert found is not None
    return found


def test_a_plain_request_has_no_groups() -> None:
    plain = resolve(temperature=0.5, top_k=-1, min_p=0.1, min_tokens=2, max_tokens=5)
    assert plain == TokenParams(0.5, 1.0, 0, 0.1, 5, 3, 2, plain.stop_token_ids)


@pytest.mark.parametrize(("ignore_eos", "stops"), [(False, {1, 2, 9}), (True, {1, 2})])
def test_end_of_sequence_tokens_stop_unless_ignored(ignore_eos: bool, stops: set[int]) -> None:
    resolved = resolve(stop_token_ids=[1, 2], ignore_eos=ignore_eos)
    assert set(resolved.stop_token_ids) == stops


@pytest.mark.parametrize(
    "asked",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.5},
        {"allowed_token_ids": (3, 4)},
    ],
)
def test_what_is_asked_for_is_told_and_the_rest_keeps_its_default(asked: dict[str, Any]) -> None:
    assert adjustments(**asked) == LogitAdjustments(**asked)


def test_biases_are_clamped() -> None:
    bias = adjustments(logit_bias={1: 3, 2: 1e30, 3: -101}).logit_bias
    assert bias == {1: 3.0, 2: 100.0, 3: -100.0}


@pytest.mark.parametrize(
    "name",
    [
        "allowed_token_ids",
        "logprob_token_ids",
        "prompt_logprob_token_ids",
        "trace_decode_token_ids",
    ],
)
def test_ids_outside_the_vocabulary_are_refused(name: str) -> None:
    known: dict[str, Any] = {name: [VOCAB_SIZE - 1]}
    resolve(**known)
    unknown: dict[str, Any] = {name: [0, VOCAB_SIZE]}
    with pytest.raises(InvalidParameterError, match=f"{name}={VOCAB_SIZE}.*{VOCAB_SIZE - 1}"):
        resolve(**unknown)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=f"logit_bias={VOCAB_SIZE}"):
        resolve(logit_bias={VOCAB_SIZE: 1.0})


def test_a_trace_forces_tokens_and_is_ended_by_none_of_them() -> None:
    resolved = resolve(trace_decode_token_ids=[2, 9, 2], stop_token_ids=[9])
    assert resolved.adjustments == LogitAdjustments(forced_token_ids=(2, 9, 2))
    assert resolved.stop_token_ids == ()


# ---- text


def test_a_bad_word_is_told_in_both_forms(tokenizer: Tokenizer) -> None:
    words = adjustments(tokenizer=tokenizer, bad_words=["ab", " ab"]).bad_words
    forms = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in ("ab", " ab")]
    assert words == tuple(forms)


def test_a_bad_word_of_spaces_is_told_as_it_is(tokenizer: Tokenizer) -> None:
    [word] = adjustments(tokenizer=tokenizer, bad_words=["  "]).bad_words
    assert tokenizer.decode(word) == "  "


def test_a_thinking_budget_knows_how_the_model_thinks(tokenizer: Tokenizer) -> None:
    marks = RequestConfig(reasoning_start_str="[a]", reasoning_end_str="[/a]")
    thinking = adjustments(requests=marks, tokenizer=tokenizer, thinking_token_budget=7).thinking
    start, end = (tuple(tokenizer.encode(text, False)) for text in ("[a]", "[/a]"))
    assert thinking == ThinkingBudget(7, start, end)


def test_a_model_that_does_not_think_has_no_budget_for_it(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParameterError, match=r"thinking_token_budget=7.*'<think>'"):
        resolve(tokenizer=tokenizer, thinking_token_budget=7)


# ---- logprobs


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"logprobs": 0}, LogprobsRequest(0)),
        ({"logprobs": 20, "prompt_logprobs": 3}, LogprobsRequest(20, (), 3)),
        ({"logprob_token_ids": [5]}, LogprobsRequest(0, (5,))),
        (
            {"prompt_logprob_token_ids": [6], "prompt_logprob_start": 4},
            LogprobsRequest(None, (), 0, (6,), 4),
        ),
        (
            {"logprobs": 1, "logprobs_mode": "processed_logits"},
            LogprobsRequest(1, mode=LogprobsMode.PROCESSED_LOGITS),
        ),
    ],
)
def test_logprobs_are_told(asked: dict[str, Any], told: LogprobsRequest) -> None:
    assert resolve(**asked).logprobs == told


def test_the_engines_mode_is_taken_where_a_request_names_none() -> None:
    engine = RequestConfig(logprobs_mode="raw_logits")
    for own, mode in ((None, LogprobsMode.RAW_LOGITS), ("raw_logprobs", LogprobsMode.RAW_LOGPROBS)):
        told = resolve(engine, logprobs=1, logprobs_mode=own).logprobs
        assert told is not None and told.mode is mode


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_logprobs_than_the_engine_gives_are_refused(name: str) -> None:
    for engine, legal, illegal in (
        (RequestConfig(), [0, 20], [21, -1, 10**9]),
        (RequestConfig(max_logprobs=0), [0], [1, -1]),
        (RequestConfig(max_logprobs=-1), [-1, 0, 10**6], []),
    ):
        for count in legal:
            resolve(engine, None, **{name: count})
        for count in illegal:
            with pytest.raises(InvalidParameterError, match=f"{name}={count}.*max_logprobs"):
                resolve(engine, None, **{name: count})


# ---- processors, repetition, the cache


def test_a_processor_is_called_by_its_path_or_its_class_name() -> None:
    engine = RequestConfig(logits_processors=("a.b:First", "c:Second"))
    asked = {"Second": {"x": 1}, "a.b:First": {}}
    found = resolve(engine, logits_processors=asked).adjustments
    assert found is not None
    assert found.processors == (ProcessorCall(1, {"x": 1}), ProcessorCall(0, {}))
    for unknown in ("Third", "b:First", ""):
        with pytest.raises(InvalidParameterError, match=r"logits_processors='.*a\.b:First"):
            resolve(engine, logits_processors={unknown: {}})


def test_repetition_detection_and_the_cache_switch_are_told() -> None:
    repetition = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=2, min_count=3)
    told = resolve(repetition_detection=repetition, skip_reading_prefix_cache=True)
    assert told.repetition == RepetitionDetection(4, 2, 3)
    assert told.skip_reading_prefix_cache


def test_no_bias_is_lost_to_rounding() -> None:
    assert adjustments(logit_bias={1: math.pi}).logit_bias == {1: math.pi}
