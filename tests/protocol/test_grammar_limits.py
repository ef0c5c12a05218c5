"""Bounds on grammars: at the limit, one over, and bombs that must be found before they go off."""

import json
import time
from typing import Any

import pytest

from footplate.protocol.bounds import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from footplate.protocol.grammar_limits import (
    MAX_CLASSES,
    MAX_FOLDED_CLASSES,
    MAX_LENGTH,
    MAX_MULTIPLE,
    MAX_OPTIONAL_WORK,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_PROPERTIES,
    MAX_SCHEMA_STRING_BYTES,
    GrammarLimitError,
    check_grammar,
    check_regex,
    check_schema,
    check_size,
)

MAX_OPTIONAL = int(MAX_OPTIONAL_WORK**0.5)  # in one expression


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = [value]
    return value


def properties(count: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": {"type": "null"} for i in range(count)}}


def doubled_terminals(doublings: int) -> str:
    rules = "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(doublings))
    return f'start: A0\n{rules}A{doublings}: "a"?\n'


def chained_terminals(count: int) -> str:
    rules = "".join(f'A{i}: A{i + 1} "b"\n' for i in range(count))
    return f'start: A0\n{rules}A{count}: "x"\n'


@pytest.mark.parametrize(
    ("at_limit", "one_over"),
    [
        (nested(MAX_SCHEMA_DEPTH), nested(MAX_SCHEMA_DEPTH + 1)),
        (properties(MAX_SCHEMA_PROPERTIES), properties(MAX_SCHEMA_PROPERTIES + 1)),
        ({"const": "x" * MAX_SCHEMA_STRING_BYTES}, {"const": "x" * (MAX_SCHEMA_STRING_BYTES + 1)}),
        ({"pattern": "x" * MAX_REGEX_BYTES}, {"pattern": "x" * (MAX_REGEX_BYTES + 1)}),
        (
            {"patternProperties": {"x" * MAX_REGEX_BYTES: {}}},
            {"patternProperties": {"x" * (MAX_REGEX_BYTES + 1): {}}},
        ),
        ({"multipleOf": MAX_MULTIPLE}, {"multipleOf": MAX_MULTIPLE + 1}),
        ({"maxLength": MAX_LENGTH}, {"maxLength": MAX_LENGTH + 1}),
        ({"minLength": MAX_LENGTH}, {"minLength": 1e300}),
        ({"multipleOf": MAX_MULTIPLE / 1000}, {"multipleOf": (MAX_MULTIPLE + 1) / 1000}),
        ({"pattern": "a?" * MAX_OPTIONAL}, {"pattern": "a?" * (MAX_OPTIONAL + 1)}),
        ({"pattern": r"\w" * (MAX_CLASSES)}, {"allOf": [{"pattern": r"\w" * 2049}] * 2}),
        (
            {"pattern": "(?i)" + "[a]" * MAX_FOLDED_CLASSES},
            {"pattern": "(?i)" + "[a]" * (MAX_FOLDED_CLASSES + 1)},
        ),
    ],
)
def test_a_schema_may_be_at_each_limit_and_not_one_over(at_limit: Any, one_over: Any) -> None:
    check_schema(at_limit)
    with pytest.raises(GrammarLimitError):
        check_schema(one_over)
    text = json.dumps({"grammars": [{"json_schema": one_over}]})
    with pytest.raises(GrammarLimitError):
        check_grammar(text)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("start: A\nA: " + '"a"? ' * MAX_OPTIONAL, True),
        ("start: A\nA: " + '"a"? ' * (MAX_OPTIONAL + 1), False),
        ("start: " + '"a"? ' * (MAX_OPTIONAL + 1), False),
        (doubled_terminals(10), True),
        (doubled_terminals(14), False),
        (doubled_terminals(5000), False),
        (chained_terminals(1000), True),
        (chained_terminals(12_000), False),
        ("start: A\nA: B\nB: A\n", True),  # the engine says that it is circular
        ('start: "' + "?[*" * 20_000 + '"', True),  # text is no operator
        ("// " + "?" * 20_000 + '\nstart: "a"', True),
        ("start: /(?i)" + "[a]" * (MAX_FOLDED_CLASSES + 1) + "/", False),
        ("start: /" + "[a]" * (MAX_FOLDED_CLASSES + 1) + "/i", False),
        ("start: /" + "[a]" * 101 + "/", True),
        ('start: %json {"multipleOf": 99999989}', False),
        ('start: %json {"multipleOf": 9', True),  # the engine says that it is no JSON
        ("start: %json " + '{"a":' * 100_000, False),
        ('{"grammars": [{"lark_grammar": "start: %json {\\"multipleOf\\": 99999989}"}]}', False),
        ('{"grammars": [{"json_schema": true}]}', True),
        ('{"grammars": 3}', False),
        ('{"grammars": [3]}', False),
        ("{", False),
        ("", True),
        ('start: "' + "x" * 2 * MAX_GRAMMAR_BYTES + '"', False),
    ],
)
def test_a_grammar_is_refused_for_what_it_would_cost_and_not_for_its_text(
    text: str, is_allowed: bool
) -> None:
    since = time.perf_counter()
    if is_allowed:
        check_grammar(text)
    else:
        with pytest.raises(GrammarLimitError):
            check_grammar(text)
    assert time.perf_counter() - since < 2


def test_values_that_contain_themselves_or_unfold_without_end_are_found_in_time() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    wide: list[Any] = []
    for _ in range(MAX_SCHEMA_DEPTH - 2):
        wide = [wide] * 10
    for value in (endless, wide, {"a": ["x" * MAX_GRAMMAR_BYTES]}, nested(100_000)):
        since = time.perf_counter()
        with pytest.raises(GrammarLimitError):
            check_size(value)
        assert time.perf_counter() - since < 2


@pytest.mark.parametrize(
    ("multiples", "is_allowed"),
    [
        ([2, 5, 100, 0.01], True),
        ([127, 131], True),
        ([139, 149], False),  # each is small, both together are not
        ([1e308], False),
        ([1e-300], True),  # one, in its own unit
        ([0, -7], True),  # the engine says that they must be positive
        ([1e300, 1e-300], False),
    ],
)
def test_multiples_are_bounded_by_what_they_have_in_common(
    multiples: list[float], is_allowed: bool
) -> None:
    schema = {"allOf": [{"multipleOf": multiple} for multiple in multiples]}
    if is_allowed:
        check_schema(schema)
    else:
        with pytest.raises(GrammarLimitError, match="multiple"):
            check_schema(schema)


def test_a_long_description_and_a_property_named_like_a_keyword_are_fine() -> None:
    check_schema({"description": "x" * 2 * MAX_SCHEMA_STRING_BYTES})
    check_schema({"properties": {"pattern": {"const": 1}, "multipleOf": {"type": "string"}}})


def test_an_expression_of_many_words_is_fine() -> None:
    check_regex("|".join(f"w{i}" for i in range(1500)))
