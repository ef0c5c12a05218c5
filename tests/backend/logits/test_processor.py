"""Custom processors: what they see, what they may do, and that their failures are one request's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from footplate.backend.logits.processor import LogitsProcessor, load_processors
from footplate.backend.logits.rows import LogitRows
from footplate.protocol.errors import EngineStartError
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import ProcessorCall

from .builders import FloatRow, SetGrammar, edited_row, make_request, run

LOGITS = [1.0, -2.0, 3.0, 0.5, 0.0]


class Favour(LogitsProcessor):
    """Adds to the logit of the token whose id is the length of the output."""

    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> None:
        if not isinstance(arguments.get("bonus"), int):
            raise ValueError("bonus must be an integer")

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        logits[len(output_token_ids)] += self.arguments["bonus"]


class Recorder:
    """Duck-typed: no subclass, no check of arguments."""

    seen: list[Any]

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        self.seen = arguments["list"]
        self.seen.append((list(prompt), vocab_size))

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        self.seen.append((list(output_token_ids), logits.tolist()))


class Misbehave(LogitsProcessor):
    """Does to the row what its argument says."""

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        super().__init__(arguments, prompt, vocab_size)
        if arguments["how"] == "init":
            raise RuntimeError("no start")

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        match self.arguments["how"]:
            case "raise":
                raise KeyError("lost")
            case "nan":
                logits[0] = math.nan
            case "infinity":
                logits[0] = math.inf
            case "shape":
                logits += np.zeros(len(logits) + 1, np.float32)
            case "index":
                logits[len(logits)] = 0.0
            case "mask":
                logits.fill(-math.inf)


PROCESSORS: Any = (Favour, Recorder, Misbehave)


def call(index: int, **arguments: Any) -> ProcessorCall:
    return ProcessorCall(index, arguments)


def test_a_processor_changes_logits_by_arguments_and_output() -> None:
    for output in ([], [1], [1, 4]):
        request = make_request([3], output, processors=(call(0, bonus=10),))
        row = edited_row(LOGITS, request, PROCESSORS)
        assert row == [x + 10 * (i == len(output)) for i, x in enumerate(LOGITS)]


def test_a_processor_is_made_once_and_sees_prompt_output_and_edited_logits() -> None:
    seen: list[Any] = []
    request = make_request(
        [3, 4],
        processors=(call(1, list=seen), call(0, bonus=10)),
        logit_bias={1: 1.0},
        presence_penalty=1.0,
    )
    rows = LogitRows(PROCESSORS)
    run(rows, request, LOGITS)
    request.token_ids += [2]
    run(rows, request, LOGITS)
    biased = [1.0, -1.0, 3.0, 0.5, 0.0]
    assert seen == [([3, 4], 5), ([], biased), ([2], biased)]


def test_a_processor_cannot_break_a_grammar() -> None:
    request = make_request(
        processors=(call(0, bonus=100),), grammar=SetGrammar({1, 4}, vocab_size=5)
    )
    assert run(LogitRows(PROCESSORS), request, LOGITS)[1].token_ids == [4]


@pytest.mark.parametrize(
    ("processor", "kind", "words"),
    [
        (call(3), ErrorKind.PROCESSOR, "there is no logits processor 3: this engine has 3"),
        (call(0, bonus="x"), ErrorKind.PROCESSOR, "Favour: ValueError: bonus must be an integer"),
        (call(2, how="init"), ErrorKind.PROCESSOR, "Misbehave: RuntimeError: no start"),
        (call(2, how="raise"), ErrorKind.PROCESSOR, "Misbehave: KeyError: 'lost'"),
        (call(2, how="index"), ErrorKind.PROCESSOR, "Misbehave: IndexError"),
        (call(2, how="shape"), ErrorKind.PROCESSOR, "Misbehave: ValueError"),
        (call(2, how="nan"), ErrorKind.PROCESSOR, "Misbehave left a NaN or infinity"),
        (call(2, how="infinity"), ErrorKind.PROCESSOR, "Misbehave left a NaN or infinity"),
        (call(2, how="mask"), ErrorKind.LOGITS, "no token is possible, with logits_processors"),
    ],
)
def test_what_a_processor_does_wrong_is_its_requests_error(
    processor: ProcessorCall, kind: ErrorKind, words: str
) -> None:
    rows = LogitRows(PROCESSORS)
    for _ in range(2):
        _, result = run(rows, make_request(processors=(processor,)), LOGITS)
        assert result.errors[0].kind is kind
        assert words in result.errors[0].message
    good = make_request(key=2, processors=(call(0, bonus=10),))
    assert run(rows, good, LOGITS)[1].token_ids == [0]


def test_a_processor_is_not_blamed_for_the_models_nan() -> None:
    request = make_request(processors=(call(0, bonus=1),))
    _, result = run(LogitRows(PROCESSORS), request, [math.nan, *LOGITS[1:]])
    assert result.errors[0].kind is ErrorKind.LOGITS


def test_the_base_class_does_nothing_that_could_go_unnoticed() -> None:
    LogitsProcessor.check_arguments({})
    with pytest.raises(NotImplementedError):
        LogitsProcessor({}, [], 5)([], np.zeros(5, np.float32))


# ---- loading


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "processors_of_a_test.py").write_text(
        "class Outer:\n"
        "    class Good:\n"
        "        def __init__(self, arguments, prompt, vocab_size): pass\n"
        "        def __call__(self, output, logits): pass\n"
        "class Bad: pass\n"
        "def function(output, logits): pass\n"
    )
    (tmp_path / "broken_processors_of_a_test.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_processors_are_loaded_in_order(module: None) -> None:
    names = ["processors_of_a_test:Outer.Good", f"{LogitsProcessor.__module__}:LogitsProcessor"]
    assert [kind.__name__ for kind in load_processors(names)] == ["Good", "LogitsProcessor"]
    assert load_processors([]) == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("processors_of_a_test", "must be 'package.module:Class'"),
        (":Good", "must be 'package.module:Class'"),
        ("processors_of_a_test:", "must be 'package.module:Class'"),
        ("no_such_module_anywhere:Good", "ModuleNotFoundError"),
        ("processors_of_a_test:Missing", "AttributeError"),
        ("processors_of_a_test:Bad", "is no class with __call__"),
        ("processors_of_a_test:function", "is no class with __call__"),
        ("broken_processors_of_a_test:Good", "ZeroDivisionError"),
        (".relative:Good", "TypeError"),
    ],
)
def test_a_processor_that_cannot_be_loaded_is_named(module: None, name: str, words: str) -> None:
    with pytest.raises(EngineStartError) as caught:
        load_processors([name])
    assert repr(name) in str(caught.value) and words in str(caught.value)
