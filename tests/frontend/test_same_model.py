"""Which models another core may come with."""

import pytest
from msgspec.structs import replace

from footplate.frontend.same_model import require_same_architecture, require_same_model
from footplate.protocol.errors import EngineDeadError, EngineError
from footplate.protocol.messages import ModelFacts

BEFORE = ModelFacts(
    "/models/one", "/none", "Llama", 1000, 100, (2,), "bfloat16", "cpu", "paged torch"
)


def test_a_core_that_comes_by_itself_has_the_same_model() -> None:
    require_same_model(BEFORE, BEFORE)
    # What does not change a token may change.
    require_same_model(BEFORE, replace(BEFORE, tokenizer="/other", attention="kernels"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "/models/two"}, "model was '/models/one', is '/models/two'"),
        ({"dtype": "float32"}, "dtype was 'bfloat16', is 'float32'"),
        ({"eos_token_ids": ()}, r"eos_token_ids was \(2,\), is \(\)"),
    ],
)
def test_with_another_model_it_is_of_no_use(changed: dict[str, object], words: str) -> None:
    with pytest.raises(EngineDeadError, match=f"came back with another model: {words}"):
        require_same_model(BEFORE, replace(BEFORE, **changed))


def test_a_core_that_was_asked_for_may_have_other_weights_of_the_same_architecture() -> None:
    require_same_architecture(BEFORE, replace(BEFORE, model="/models/two", dtype="float32"))


def test_one_that_was_asked_for_and_cannot_go_on_with_the_streams_says_what_must_be_equal() -> None:
    after = replace(BEFORE, model="/models/two", vocab_size=1001)
    with pytest.raises(EngineError) as raised:
        require_same_architecture(BEFORE, after)
    assert not isinstance(raised.value, EngineDeadError), "the core that serves goes on"
    for words in (
        "replace_core was asked for model='/models/two'",
        "vocab_size is 1001, and must be 1000",
        "build another engine",
    ):
        assert words in str(raised.value)
