"""What the rules for failing on purpose mean. What they do to a core: `tests/chaos`."""

from collections.abc import Callable
from functools import partial

import pytest

from footplate.backend import fail_points
from footplate.backend.fail_points import FailPoint, parse
from footplate.backend.request import Request
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 5, 0, ())


def request(*token_ids: int, num_output_tokens: int = 0) -> Request:
    num_prompt_tokens = len(token_ids) - num_output_tokens
    return Request(1, b"client", 1, list(token_ids), num_prompt_tokens, PARAMS)


@pytest.fixture
def passages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """At which of so many passages a rule acts."""

    def of(rule: str, *requests: Request, count: int = 6) -> list[int]:
        [point] = parse(rule)
        acted: list[int] = []
        monkeypatch.setattr(fail_points, "_POINTS", [point])
        for number in range(1, count + 1):
            point.act = partial(acted.append, number)
            fail_points.reach("core.sent")
            fail_points.reach("core.step", requests)
        return acted

    return of


def test_nothing_fails_unless_the_environment_says_so() -> None:
    assert not fail_points.ENABLED
    assert parse("") == parse(" ; ") == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("core.step:raise", [1, 2, 3, 4, 5, 6]),
        ("core.step:raise@1", [1]),
        ("core.step:raise@4", [4]),
        ("core.step:raise@4+", [4, 5, 6]),
        ("core.step:raise@7", []),
        ("core.outputs:raise", []),
    ],
)
def test_a_rule_acts_at_the_passages_it_names(
    passages: Callable[..., list[int]], rule: str, expected: list[int]
) -> None:
    assert passages(rule) == expected


def test_a_mark_counts_only_where_a_prompt_holds_it(passages: Callable[..., list[int]]) -> None:
    marked, other, said_it = request(1, 777), request(1, 2), request(1, 777, num_output_tokens=1)
    assert passages("core.step:raise#777", other, marked) == [1, 2, 3, 4, 5, 6]
    assert passages("core.step:raise#777@2", other, marked) == [2]
    assert passages("core.step:raise#777", other, said_it) == []
    assert passages("core.step:raise#777") == []


def test_several_rules_stand_side_by_side() -> None:
    points = parse("core.step:raise@17; runner.execute:sleep=0.005;core.outputs:exit=12@3+")
    assert [(p.place, p.first, p.last) for p in points] == [
        ("core.step", 17, 17),
        ("runner.execute", 1, None),
        ("core.outputs", 3, None),
    ]


@pytest.mark.parametrize(("rule", "error"), [("raise", RuntimeError), ("oom", MemoryError)])
def test_an_exception_is_raised_where_the_place_is(rule: str, error: type[Exception]) -> None:
    [point] = parse(f"core.step:{rule}")
    with pytest.raises(error):
        point.pass_by(())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("core.step", "core.step"),
        ("core.step:", "core.step:"),
        ("core.steps:raise", "core.steps"),
        ("core.step:explode", "explode"),
        ("core.step:sleep", "sleep"),
        ("core.step:raise=1", "raise"),
        ("core.step:exit", "exit"),
        ("core.step:raise@", "raise@"),
        ("core.step:raise@-1", "raise@-1"),
        ("core.step:raise@1#2", "raise@1#2"),
        ("core.step:raise,core.step:raise", "raise,"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(rule: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"FOOTPLATE_FAIL_POINTS: ") as error:
        parse(f"core.sent:raise;{rule}")
    assert words in str(error.value)


def test_a_point_remembers_what_it_has_seen() -> None:
    point = FailPoint("core.step", lambda: None)
    point.pass_by(())
    point.pass_by(())
    assert point.num_passages == 2
