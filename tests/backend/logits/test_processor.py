"""Custom processors: what they see, what they may do, and that their failures are one request's."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from footplate.backend.logits.processor import LogitsProcessor, load_processors
from footplate.backend.logits.rows import LogitRows
from footplate.backend.termination import Terminated
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

    seen: ClassVar[list[Any]] = []

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        self.seen.append((list(prompt), vocab_size))

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        self.seen.append((list(output_token_ids), logits.tolist()))


class Consumer(LogitsProcessor):
    """Takes its arguments apart."""

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        self.token_id = arguments["ids"].pop()

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        logits[self.token_id] = 100.0


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class ExitingError(Exception):
    def __str__(self) -> str:
        sys.exit(3)


class Forgetful(LogitsProcessor):
    """Looks at the newest token only, and remembers the others: it must not be called twice for
    one position, and a new one is shown the whole output."""

    def __init__(self, arguments: dict[str, Any], prompt: Sequence[int], vocab_size: int) -> None:
        self.taken: list[int] | None = None

    def __call__(self, output_token_ids: Sequence[int], logits: FloatRow) -> None:
        new = output_token_ids if self.taken is None else output_token_ids[-1:]
        self.taken = [*(self.taken or []), *new]
        assert self.taken == list(output_token_ids)
        logits[len(self.taken)] += 10


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
            case "exit":
                sys.exit(3)
            case "unspeakable":
                raise UnspeakableError
            case "exit unspeakably":
                raise ExitingError
            case "tell":
                raise OSError(f"cannot read /home/{self!r}/model at ipc:///run/x of 10.0.0.1:80")
            case "return":
                return logits * 2  # type: ignore[return-value]
            case "reshape":
                logits.shape = (1, len(logits))
            case "lock":
                logits.flags.writeable = False
            case "terminated":
                raise Terminated(143)


PROCESSORS: Any = (Favour, Recorder, Misbehave, Consumer, Forgetful)


def call(index: int, **arguments: Any) -> ProcessorCall:
    return ProcessorCall(index, arguments)


def test_a_processor_changes_logits_by_arguments_and_output() -> None:
    for output in ([], [1], [1, 4]):
        request = make_request([3], output, processors=(call(0, bonus=10),))
        row = edited_row(LOGITS, request, PROCESSORS)
        assert row == [x + 10 * (i == len(output)) for i, x in enumerate(LOGITS)]


def test_a_processor_is_made_once_and_sees_prompt_output_and_edited_logits() -> None:
    seen = Recorder.seen
    seen.clear()
    request = make_request(
        [3, 4],
        processors=(call(1), call(0, bonus=10)),
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
        (call(5), ErrorKind.PROCESSOR, "there is no logits processor 5: this engine has 5"),
        (call(0, bonus="x"), ErrorKind.PROCESSOR, "Favour: ValueError: bonus must be an integer"),
        (call(2, how="init"), ErrorKind.PROCESSOR, "Misbehave: RuntimeError: no start"),
        (call(2, how="raise"), ErrorKind.PROCESSOR, "Misbehave: KeyError: 'lost'"),
        (call(2, how="index"), ErrorKind.PROCESSOR, "Misbehave: IndexError"),
        (call(2, how="shape"), ErrorKind.PROCESSOR, "Misbehave: ValueError"),
        (call(2, how="nan"), ErrorKind.PROCESSOR, "Misbehave left a NaN or infinity"),
        (call(2, how="infinity"), ErrorKind.PROCESSOR, "Misbehave left a NaN or infinity"),
        (call(2, how="exit"), ErrorKind.PROCESSOR, "Misbehave: SystemExit: 3"),
        (call(2, how="unspeakable"), ErrorKind.PROCESSOR, "Misbehave: UnspeakableError"),
        (call(2, how="exit unspeakably"), ErrorKind.PROCESSOR, "Misbehave: ExitingError"),
        (call(2, how="return"), ErrorKind.PROCESSOR, "Misbehave returned a ndarray: it must"),
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


@pytest.mark.parametrize("how", ["reshape", "lock"])
def test_what_a_processor_does_to_the_array_itself_does_not_reach_the_row(how: str) -> None:
    request = make_request(processors=(call(2, how=how),), presence_penalty=1.0)
    assert edited_row(LOGITS, request, PROCESSORS) == LOGITS


def test_what_a_processor_raises_tells_nothing_of_where_it_runs() -> None:
    _, result = run(LogitRows(PROCESSORS), make_request(processors=(call(2, how="tell"),)), LOGITS)
    assert result.errors[0].message == (
        "logits processor Misbehave: OSError: cannot read <path> at <address> of <address>"
    )


def test_a_processor_that_remembers_is_made_anew_when_a_step_is_run_again() -> None:
    rows, request = LogitRows(PROCESSORS), make_request([3], [], processors=(call(4),))
    tokens = []
    for _ in range(3):
        first, second = (run(rows, request, LOGITS)[1] for _ in range(2))
        assert first.token_ids == second.token_ids and not second.errors
        tokens.append(first.token_ids[0])
        request.token_ids.append(first.token_ids[0])
    assert tokens == [0, 1, 2]


def test_a_signal_that_comes_while_a_processor_runs_still_ends_the_process() -> None:
    with pytest.raises(Terminated):
        run(LogitRows(PROCESSORS), make_request(processors=(call(2, how="terminated"),)), LOGITS)


def test_a_processor_that_takes_its_arguments_apart_leaves_them_whole_for_the_next() -> None:
    processors = (call(3, ids=[2]),)
    rows = LogitRows(PROCESSORS)
    # A sibling; then the same request, made again after a preemption.
    for key in (1, 2, 2):
        request = make_request(key=key, processors=processors)
        assert run(rows, request, LOGITS)[1].token_ids == [2]


def test_arguments_that_are_nested_too_deep_are_their_requests_error() -> None:
    arguments: dict[str, Any] = {}
    for _ in range(900):
        arguments = {"bonus": arguments}
    _, result = run(LogitRows(PROCESSORS), make_request(processors=(call(0, **arguments),)), LOGITS)
    assert "Favour: RecursionError" in result.errors[0].message


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
