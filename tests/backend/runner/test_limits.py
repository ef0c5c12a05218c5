from types import SimpleNamespace
from typing import Any

import pytest

from footplate.backend.runner.limits import (
    DEFAULT_LENGTH,
    LengthLimits,
    attention_windows,
    eos_token_ids,
    length_limits,
)


def config(**fields: Any) -> Any:
    text = SimpleNamespace(**fields)
    text.get_text_config = lambda decoder: text
    return text


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"])
def test_the_length_limit_has_many_names(name: str) -> None:
    assert length_limits(config(**{name: 77})) == LengthLimits(77, 77)


def test_a_model_without_a_limit_gets_one() -> None:
    assert length_limits(config(max_position_embeddings=None)).hard == DEFAULT_LENGTH


@pytest.mark.parametrize("inside", [True, False])
def test_longrope_lowers_the_paged_limit(inside: bool) -> None:
    original = {"original_max_position_embeddings": 40}
    rope = {"rope_type": "longrope"} | (original if inside else {})
    fields = {} if inside else original
    found = length_limits(config(max_position_embeddings=99, rope_parameters=rope, **fields))
    assert found == LengthLimits(99, 40)


def test_other_rotary_variants_do_not() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 40}
    assert length_limits(config(n_positions=99, rope_parameters=rope)) == LengthLimits(99, 99)
    per_layer_type = {"full_attention": {"rope_type": "default"}}
    found = length_limits(config(n_positions=99, rope_parameters=per_layer_type))
    assert found == LengthLimits(99, 99)


def test_only_windows_that_can_be_exceeded_count() -> None:
    both = config(sliding_window=100, attention_chunk_size=50)
    assert attention_windows(both, 101) == {100, 50}
    assert attention_windows(both, 100) == {50}
    assert attention_windows(config(sliding_window=None), 1000) == set()
    assert attention_windows(config(compress_rates={"a": 4, "b": 128}), 1000) == {4, 128}


def test_end_of_sequence_tokens_come_from_everywhere() -> None:
    model = SimpleNamespace(
        config=config(eos_token_id=5), generation_config=SimpleNamespace(eos_token_id=[9, 5, 3])
    )
    assert eos_token_ids(model) == (3, 5, 9)
    model.config = config(eos_token_id=None)
    model.generation_config = None
    assert eos_token_ids(model) == ()
