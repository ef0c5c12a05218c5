"""The instrument that counts what kills have cost: that it counts, and that it kills."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from footplate.frontend import CompletionOutput, RequestMetrics, RequestOutput

SCRIPT = Path(__file__).parents[2] / "scripts" / "chaos.py"
LoadScript = Callable[[str], ModuleType]


def output(token_ids: list[int], text: str = "") -> RequestOutput:
    """Of a request with one completion."""
    part = CompletionOutput(0, text, token_ids)
    return RequestOutput("a", None, [1], [part], False, 7, RequestMetrics(0.0, 0.0))


def damage(load: ModuleType, expected: list[int], got: list[int], **difference: Any) -> list[int]:
    """Lost, doubled and changed tokens."""
    wanted, has = (
        load.Answer(completions={0: load.Completion(token_ids=ids, text="text")})
        for ids in (expected, got)
    )
    for name, value in difference.items():
        setattr(has.completions[0], name, value)
    count = load.Damage()
    assert count.add(wanted, has) == (wanted != has)
    return [count.lost, count.doubled, count.changed]


def test_tokens_that_are_lost_doubled_or_changed_are_counted(load_script: LoadScript) -> None:
    load = load_script("chaos_load")
    assert damage(load, [1, 2, 3, 4], [1, 2, 3, 4]) == [0, 0, 0]
    assert damage(load, [1, 2, 3, 4], [1, 4]) == [2, 0, 0]
    assert damage(load, [1, 2, 3, 4], [1, 2, 2, 3, 4]) == [0, 1, 0]
    assert damage(load, [1, 2, 3, 4], [1, 9, 3, 4]) == [0, 0, 1]
    assert damage(load, [1, 2], []) == [2, 0, 0]


@pytest.mark.parametrize(
    "difference",
    [{"text": "tex"}, {"finish_reason": "length"}, {"logprobs": [0.5]}, {"stop_reason": "t"}],
)
def test_what_differs_beside_the_tokens_counts_as_one_change(
    load_script: LoadScript, difference: dict[str, Any]
) -> None:
    assert damage(load_script("chaos_load"), [1, 2], [1, 2], **difference) == [0, 0, 1]


def test_a_completion_that_never_came_and_one_that_nobody_asked_for_count(
    load_script: LoadScript,
) -> None:
    load = load_script("chaos_load")
    one, none = load.Answer(completions={1: load.Completion(token_ids=[1, 2])}), load.Answer()
    count = load.Damage()
    assert count.add(one, none) and count.add(none, one)
    assert (count.lost, count.doubled, count.changed) == (2, 2, 0)


def test_an_output_that_takes_back_what_was_said_is_noticed(load_script: LoadScript) -> None:
    answer = load_script("chaos_load").Answer()
    assert answer.add(output([1, 2], "ab"), is_delta=False) == 2
    assert answer.add(output([1, 2, 3], "abc"), is_delta=False) == 1
    assert not answer.took_back
    answer.add(output([1, 9, 3, 4], "abcd"), is_delta=False)
    assert answer.took_back


@pytest.mark.chaos
@pytest.mark.parametrize("options", [("--standby",), ("--kill", "garbage")], ids=" ".join)
def test_a_run_kills_and_finds_every_answer_as_it_was(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "2", "--streams", "14", "--requests", "14", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0, doubled 0, changed 0, failed 0" in done.stdout
