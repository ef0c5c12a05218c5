"""BeamSearchParams refuses what a search could not mean."""

import math
from typing import Any

import msgspec
import pytest

from footplate.frontend.beam_params import (
    MAX_BEAM_WIDTH,
    MAX_LENGTH_PENALTY,
    BeamSearchParams,
)
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.structured import StructuredOutputsParams

REQUIRED = {"beam_width": 2, "max_tokens": 4}


def test_defaults_are_those_of_vllm_and_transformers() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    assert (params.temperature, params.length_penalty, params.early_stopping) == (0.0, 1.0, False)
    assert (params.ignore_eos, params.include_stop_str_in_output) == (False, False)
    assert (params.detokenize, params.structured_outputs) == (True, None)


@pytest.mark.parametrize("missing", REQUIRED)
def test_width_and_length_have_no_default(missing: str) -> None:
    with pytest.raises(TypeError, match=missing):
        BeamSearchParams(**{k: v for k, v in REQUIRED.items() if k != missing})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("beam_width", [1, 2, MAX_BEAM_WIDTH]),
        ("max_tokens", [1, 2**31 - 1]),
        ("temperature", [0, 0.0, 1e-3, 1.0, 100.0]),
        ("length_penalty", [0, 1, -0.5, 2.0, MAX_LENGTH_PENALTY, -MAX_LENGTH_PENALTY]),
        ("early_stopping", [True, False, "never"]),
        ("ignore_eos", [True, False]),
        ("include_stop_str_in_output", [True, False]),
        ("detokenize", [True, False]),
        ("structured_outputs", [None, StructuredOutputsParams(regex="a+")]),
    ],
)
def test_values_within_bounds_are_taken(name: str, legal: list[Any]) -> None:
    for value in legal:
        params = BeamSearchParams(**(REQUIRED | {name: value}))
        assert getattr(params, name) == value


NOT_NUMBERS = [math.nan, math.inf, -math.inf, 10**400, -(10**400), True, "1", None, [1]]
NOT_FLAGS = [0, 1, "true", None]


@pytest.mark.parametrize(
    ("name", "illegal"),
    [
        ("beam_width", [0, -1, MAX_BEAM_WIDTH + 1, 2.0, *NOT_NUMBERS]),
        ("max_tokens", [0, -1, 2**31, 2.0, *NOT_NUMBERS]),
        ("temperature", [-1e-9, -1, *NOT_NUMBERS]),
        (
            "length_penalty",
            [
                math.nextafter(MAX_LENGTH_PENALTY, math.inf),
                math.nextafter(-MAX_LENGTH_PENALTY, -math.inf),
                *NOT_NUMBERS,
            ],
        ),
        ("early_stopping", [0, 1, 1.0, None, "always", ""]),
        ("ignore_eos", NOT_FLAGS),
        ("include_stop_str_in_output", NOT_FLAGS),
        ("detokenize", NOT_FLAGS),
        ("structured_outputs", ["a+", {"regex": "a+"}, True]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(name: str, illegal: list[Any]) -> None:
    for value in illegal:
        with pytest.raises(InvalidParameterError, match=f"{name}=") as caught:
            BeamSearchParams(**(REQUIRED | {name: value}))
        assert caught.value.parameter == name


def test_params_cannot_be_changed_past_their_checks() -> None:
    params = BeamSearchParams(**REQUIRED)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        params.beam_width = 0  # type: ignore[misc]
    with pytest.raises(InvalidParameterError):
        msgspec.structs.replace(params, beam_width=0)
