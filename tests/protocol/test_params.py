"""SamplingParams refuses what the engine could not mean."""

import math
from typing import Any

import pytest

from footplate.protocol.bounds import MAX_N, MAX_REPETITION_PATTERN, MAX_SEED
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.params import RepetitionDetectionParams, SamplingParams
from footplate.protocol.structured import StructuredOutputsParams


def test_defaults_are_those_of_the_field() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)


FLAGS = (
    "ignore_eos",
    "flat_logprobs",
    "skip_reading_prefix_cache",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("temperature", [0, 0.0, 0.7, 100.0]),
        ("top_p", [1e-9, 0.5, 1, 1.0]),
        ("top_k", [-1, 0, 1, 2**31 - 1]),
        ("min_p", [0, 0.5, 1.0]),
        ("seed", [None, 0, MAX_SEED]),
        ("max_tokens", [None, 1, 2**31 - 1]),
        ("min_tokens", [0, 16]),
        ("n", [1, MAX_N]),
        ("presence_penalty", [-2, 0.5, 2.0]),
        ("frequency_penalty", [-2.0, 2]),
        ("repetition_penalty", [1e-9, 1, 50.0]),
        ("bad_words", [None, [], ["x"] * 128, ("x" * 1024,)]),
        ("logit_bias", [None, {}, {0: -100, 5: 1e30}, dict.fromkeys(range(4096), 1.0)]),
        ("allowed_token_ids", [None, [0], tuple(range(262_144))]),
        ("logprobs", [None, -1, 0, 20, 2**31 - 1]),
        ("prompt_logprobs", [None, -1, 0, 20]),
        ("logprob_token_ids", [None, [], list(range(1024))]),
        ("prompt_logprob_token_ids", [None, (5,)]),
        ("prompt_logprob_start", [0, 2**31 - 1]),
        ("logprobs_mode", [None, "raw_logits", "processed_logprobs"]),
        ("thinking_token_budget", [None, 0, 2**31 - 1]),
        ("stream_interval", [None, 1, 100]),
        ("trace_decode_token_ids", [None, [0], (5, 5)]),
        (
            "logits_processors",
            [
                None,
                {},
                {"P": {"a": [1, {"b": None}]}},
                {"P": {"x": "y" * 65000}},
                {"P": {"x": 2**64 - 1}},
            ],
        ),
        *((flag, [True, False]) for flag in FLAGS),
        ("stop", [None, "x", ["a", "b"], (), ["x"] * 64, "x" * 1024]),
        ("stop_token_ids", [None, [], [0, 5], (7,), list(range(1024))]),
    ],
)
def test_values_within_bounds_are_taken(name: str, legal: list[Any]) -> None:
    for value in legal:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "illegal"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 10**400, True, "1", None]),
        ("top_p", [0, 0.0, 1.0001, -1, math.nan, False]),
        ("top_k", [-2, 2**31, 1.5, True]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("seed", [-1, MAX_SEED + 1, 1.0, True]),
        ("max_tokens", [0, -1, 2**31, 1.5, True]),
        ("min_tokens", [-1, 17]),  # 17 is more than max_tokens
        ("stop", ["", [""], ["x"] * 65, "x" * 1025, [1], 5]),
        ("stop_token_ids", [[-1], [True], [2**31], list(range(1025)), 5]),
        ("output_kind", [0, "delta"]),
        ("n", [0, -1, MAX_N + 1, 10**9, 1.0, True, math.nan]),
        ("presence_penalty", [-2.01, 2.01, math.nan, math.inf, "1", None]),
        ("frequency_penalty", [-2.01, 2.01, math.nan, True]),
        ("repetition_penalty", [0, -1, math.nan, math.inf]),
        ("bad_words", ["x", [""], ["x"] * 129, ["x" * 1025], [5], 5]),
        ("logit_bias", [[1], {-1: 0.0}, {"5": 1.0}, {1.5: 1.0}, {5: math.nan}, {5: math.inf}]),
        ("logit_bias", [dict.fromkeys(range(4097), 1.0), {2**31: 1.0}, {5: True}]),
        ("allowed_token_ids", [[], [-1], [2**31], [True], 5, list(range(262_145))]),
        ("logprobs", [-2, 2**31, 1.0, True]),
        ("prompt_logprobs", [-2, 2**31, "5"]),
        ("logprob_token_ids", [[-1], 5, list(range(1025)), [2**31]]),
        ("prompt_logprob_token_ids", [[-1], list(range(1025))]),
        ("prompt_logprob_start", [-1, None, 2**31]),
        ("logprobs_mode", ["raw", 0, "RAW_LOGITS"]),
        ("thinking_token_budget", [-1, 2**31, 1.5, True]),
        ("stream_interval", [0, -1, 2**31, True]),
        ("trace_decode_token_ids", [[], [-1], 5, [True]]),
        (
            "logits_processors",
            [
                [],
                {"P": 5},
                {5: {}},
                {"P": {"x": "y" * 66000}},
                {"P": {"x": object()}},
                {"P": {"x": 2**64}},
            ],
        ),
        ("structured_outputs", [{"json": {}}, "json", 5]),
        ("repetition_detection", [{"max_pattern_size": 5}, 5]),
        *((flag, [None, 0, 1, "yes"]) for flag in FLAGS),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(name: str, illegal: list[Any]) -> None:
    for value in illegal:
        with pytest.raises(InvalidParameterError, match=f"{name}="):
            SamplingParams(**{name: value})


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidParameterError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_an_invalid_parameter_is_a_value_error_that_names_parameter_and_value() -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(top_p=2)
    assert isinstance(caught.value, InvalidParameterError)
    assert (caught.value.parameter, caught.value.value) == ("top_p", 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("stop", ["x"]),
        ("bad_words", ["x"]),
        ("thinking_token_budget", 5),
        ("structured_outputs", StructuredOutputsParams(regex="a")),
        ("repetition_detection", RepetitionDetectionParams(max_pattern_size=2)),
    ],
)
def test_a_trace_says_what_every_token_is_so_some_parameters_go_without_it(
    name: str, value: Any
) -> None:
    SamplingParams(**{name: value})
    with pytest.raises(InvalidParameterError, match=f"{name}=.*trace_decode_token_ids"):
        SamplingParams(trace_decode_token_ids=[1], **{name: value})


@pytest.mark.parametrize("empty", ["", [], ()])
def test_a_trace_goes_with_lists_that_are_empty(empty: Any) -> None:
    stop = empty or None  # an empty stop string is refused by itself
    SamplingParams(trace_decode_token_ids=[1], stop=stop, bad_words=empty or [])


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("top_k", 10**5000, "<int>"),
        ("stop", b"x" * 10**7, None),
        ("logit_bias", [(5, 1.0)] * 10**5, None),
    ],
    ids=["top_k", "stop", "logit_bias"],
)
def test_a_value_as_large_as_the_mistake_is_shortened(
    name: str, value: Any, shown: str | None
) -> None:
    with pytest.raises(InvalidParameterError, match=f"^{name}=") as refusal:
        SamplingParams(**{name: value})
    assert len(str(refusal.value)) < 400
    assert refusal.value.value is value
    assert shown is None or shown in str(refusal.value)


def test_a_bias_without_bounds_names_none() -> None:
    with pytest.raises(InvalidParameterError, match=r"logit_bias=inf: must be a finite number$"):
        SamplingParams(logit_bias={5: math.inf})


def test_what_is_too_large_is_refused_by_its_size_and_not_shown() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(allowed_token_ids=list(range(300_000)))
    assert str(caught.value) == "allowed_token_ids='<300000 ids>': must be at most 262144 ids"


@pytest.mark.parametrize(
    "legal",
    [
        {"max_pattern_size": 1},
        {"max_pattern_size": MAX_REPETITION_PATTERN, "min_pattern_size": MAX_REPETITION_PATTERN},
        {"max_pattern_size": 5, "min_pattern_size": 2, "min_count": 2**31 - 1},
    ],
)
def test_repetition_detection_within_bounds_is_taken(legal: dict[str, int]) -> None:
    params = RepetitionDetectionParams(**legal)
    assert {name: getattr(params, name) for name in legal} == legal


@pytest.mark.parametrize(
    ("illegal", "name"),
    [
        ({"max_pattern_size": 0}, "max_pattern_size"),
        ({"max_pattern_size": MAX_REPETITION_PATTERN + 1}, "max_pattern_size"),
        ({"max_pattern_size": math.nan}, "max_pattern_size"),
        ({"max_pattern_size": 5, "min_pattern_size": 6}, "min_pattern_size"),
        ({"max_pattern_size": 5, "min_pattern_size": 0}, "min_pattern_size"),
        ({"max_pattern_size": 5, "min_count": 1}, "min_count"),
        ({"max_pattern_size": 5, "min_count": 10**12}, "min_count"),
    ],
)
def test_repetition_detection_out_of_bounds_is_refused_by_name(
    illegal: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidParameterError, match=f"repetition_detection.{name}="):
        RepetitionDetectionParams(**illegal)
