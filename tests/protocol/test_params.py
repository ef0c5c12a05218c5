"""SamplingParams refuses what the engine could not mean."""

import math
from typing import Any

import pytest

from footplate.frontend.token_params import resolve_params
from footplate.protocol.bounds import MAX_SEED
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.params import SamplingParams


def test_defaults_are_those_of_the_field() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)


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


@pytest.mark.parametrize(("ignore_eos", "stops"), [(False, {1, 2, 9}), (True, {1, 2})])
def test_end_of_sequence_tokens_stop_unless_ignored(ignore_eos: bool, stops: set[int]) -> None:
    params = SamplingParams(stop_token_ids=[1, 2], ignore_eos=ignore_eos, top_k=-1)
    resolved = resolve_params(params, seed=5, max_tokens=3, eos_token_ids=(2, 9))
    assert set(resolved.stop_token_ids) == stops
    assert (resolved.seed, resolved.max_tokens, resolved.top_k) == (5, 3, 0)
