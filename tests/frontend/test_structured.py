"""From the user's words to a grammar: every kind, legal and illegal, at its bounds and beyond."""

import copy
import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from footplate.frontend import structured
from footplate.frontend.json_schema import close_objects, tighten_exclusive_bounds
from footplate.frontend.structured import MAX_CHOICES, MAX_STRUCTURES, GrammarTranslator
from footplate.protocol.bounds import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.structured import StructuredOutputsParams


def byte_tokenizer() -> LLTokenizer:
    """Each token a byte; 256 ends."""

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = (*(bytes([i]) for i in range(256)), b"<end>")
        special_token_ids = (256,)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    from llguidance._tokenizer import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Bytes()))


TOKENIZER = byte_tokenizer()


def translate(**params: Any) -> str:
    return GrammarTranslator().translate(StructuredOutputsParams(**params)).text


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = list(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}


def nested(depth: int) -> dict[str, Any]:
    """A schema of arrays in arrays, `depth` dictionaries deep."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


# ---- every kind


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON), json.dumps(PERSON, indent=4)])
def test_json_is_a_schema_as_a_dictionary_or_as_text(schema: Any) -> None:
    grammar = translate(json=schema)
    for text in ('{"name":"x"}', '{ "name" : "x",\n"age": 3}', '{"name":"x","more":[1]}'):
        assert accepts(grammar, text), text
    for text in ("{}", '{"name":1}', '{"name":"x","age":-1}', "[]", '{"name":"x"'):
        assert not accepts(grammar, text), text


def test_json_object_is_any_object() -> None:
    grammar = translate(json_object=True)
    assert accepts(grammar, '{"a": [1, {"b": null}]}')
    assert not accepts(grammar, "[1]")


def test_a_regex_matches_the_whole_output() -> None:
    grammar = translate(regex=r"[a-c]+/\d{2}")
    assert accepts(grammar, "abc/12")
    assert not accepts(grammar, "abc/12 ")
    assert not accepts(grammar, "xabc/12")


HARD_STRINGS = [
    'a"b',
    "a\\b",
    "\n\x01\x7f",
    "é😀",
    "a b",
    "What? [y]*",
    "\u2028",
    "%json {",
    "//",
    "'",
]


def test_choices_are_taken_literally() -> None:
    grammar = translate(choice=HARD_STRINGS)
    assert all(accepts(grammar, choice) for choice in HARD_STRINGS)
    assert not accepts(grammar, "a")
    assert not accepts(grammar, HARD_STRINGS[0] + HARD_STRINGS[1])


def test_of_two_choices_one_may_begin_the_other() -> None:
    grammar = translate(choice=["a", "ab", "a"])
    assert [accepts(grammar, text) for text in ("a", "ab", "b")] == [True, True, False]


@pytest.mark.parametrize("grammar", ['start: "a" start | "b"', 'root ::= "a" root | "b"'])
def test_a_grammar_is_lark_or_gbnf(grammar: str) -> None:
    assert accepts(translate(grammar=grammar), "aaab")
    assert not accepts(translate(grammar=grammar), "aaa")


TAG: dict[str, Any] = {
    "structures": [
        {"begin": "<call=f>", "schema": PERSON, "end": "</call>"},
        {"begin": "<call=g>", "schema": {"type": "array"}, "end": "</call>"},
    ],
    "triggers": ["<call="],
}


@pytest.mark.parametrize("tag", [TAG, json.dumps(TAG), {"type": "structural_tag", **TAG}])
def test_a_structural_tag_binds_what_follows_a_trigger_and_nothing_else(tag: Any) -> None:
    grammar = translate(structural_tag=tag)
    for text in (
        "free text, <even> {tags}",
        'so: <call=f>{"name":"x"}</call> and <call=g>[1]</call>.',
        "<call",
    ):
        assert accepts(grammar, text), text
    for text in ("<call=", "<call=h>", "<call=f>[1]</call>", "<call=g>[1]", "<call=g>{}</call>"):
        assert not accepts(grammar, text), text


def test_a_trigger_that_is_a_special_token_means_the_token() -> None:
    tag = {"structures": [{"begin": "<t>", "schema": {}, "end": ""}], "triggers": ["<t>"]}
    params = StructuredOutputsParams(structural_tag=tag)
    assert "TEXT <t>" in GrammarTranslator({"<t>"}).translate(params).text
    assert 'TEXT "<t>"' in GrammarTranslator().translate(params).text


# ---- options


def test_whitespace_can_be_forbidden_or_prescribed() -> None:
    tight = translate(json=PERSON, disable_any_whitespace=True)
    assert accepts(tight, '{"name":"x y","age":1}')
    assert not accepts(tight, '{"name": "x"}')
    spaced = translate(json=PERSON, whitespace_pattern="[ ]?")
    assert accepts(spaced, '{"name": "x", "age":1}')
    assert not accepts(spaced, '{"name":  "x"}')
    tag = translate(structural_tag=TAG, disable_any_whitespace=True)
    assert accepts(tag, "a b <call=g>[1,2]</call>")
    assert not accepts(tag, "a b <call=g>[1, 2]</call>")


def test_additional_properties_can_be_forbidden_and_the_callers_schema_stays() -> None:
    schema = copy.deepcopy(PERSON)
    grammar = translate(json=schema, disable_additional_properties=True)
    assert accepts(grammar, '{"name":"x","age":1}')
    assert not accepts(grammar, '{"name":"x","more":1}')
    assert schema == PERSON


def test_objects_are_closed_wherever_schemas_stand_and_nowhere_else() -> None:
    open_object: dict[str, Any] = {"properties": {"x": {}}}
    closed = open_object | {"additionalProperties": False}

    def everywhere(part: dict[str, Any]) -> dict[str, Any]:
        return {
            "$defs": {"d": part},
            "properties": {"properties": part, "items": part, "enum": part},
            "patternProperties": {"^x": part},
            "additionalProperties": part,
            "items": part,
            "prefixItems": [part, True],
            "anyOf": [part, {"allOf": [part]}, {"oneOf": [part]}],
            "not": part,
            "enum": [open_object],
            "const": open_object,
            "default": open_object,
            "examples": [open_object],
            "type": "object",
        }

    schema = json.loads(json.dumps(everywhere(open_object)))  # no part is shared
    close_objects(schema)
    assert schema == everywhere(closed)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": {}}, "additionalProperties": True},
        {"properties": {"x": {}}, "additionalProperties": {"type": "null"}},
        {"type": "object"},
        {"type": "array"},
        True,
        [],
        3,
    ],
)
def test_schemas_that_say_what_they_allow_are_left_alone(schema: Any) -> None:
    before = copy.deepcopy(schema)
    close_objects(schema)
    tighten_exclusive_bounds(schema)
    assert schema == before


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 89, "maximum": 89.5},
        {"exclusiveMinimum": 89, "exclusiveMaximum": 89.5, "minimum": 3},
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMaximum": -18, "minimum": -18.5},
        {"exclusiveMaximum": 0, "minimum": -0.5},
        {"exclusiveMinimum": 1_000_000, "maximum": 1_000_000.5},
        {"exclusiveMinimum": 1, "exclusiveMaximum": 2},
    ],
)
def test_a_number_outside_of_its_exclusive_bounds_is_impossible(bounds: dict[str, Any]) -> None:
    schema = {"type": "number"} | bounds
    grammar = translate(json=schema)
    ends = [bounds[name] for name in bounds]
    near = [round(end + step, 3) for end in ends for step in (-0.5, -0.01, 0, 0.01, 0.25)]
    num_valid = 0
    for text in {str(number) for number in near} | {f"{number:.5f}" for number in near}:
        is_valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        num_valid += is_valid
        assert is_valid or not accepts(grammar, text), text
    assert num_valid and any(accepts(grammar, str(number)) for number in near)


# ---- what is refused

SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"json": "{"}, "not JSON"),
        ({"json": "[]"}, "schema"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"if": {}, "then": {}}}, "if"),
        ({"json": {"type": "string", "format": "wat"}}, "wat"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"$ref": "http://example.org/x"}}, "example.org"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json": {"minimum": float("nan")}}, "float"),
        ({"json": {"minimum": object()}}, "object"),
        ({"json": {"minimum": 3, "maximum": 2, "type": "integer"}}, "minimum"),
        ({"json": {"x-guidance": 3}, "disable_any_whitespace": True}, "must be"),
        ({"json": {"const": SURROGATE}}, "must be"),
        ({"json": f'{{"const": "{SURROGATE}"}}'}, "must be"),
        ({"regex": "[a"}, "unclosed"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": SURROGATE}, "must be"),
        ({"regex": "a" * 8193}, "8192"),
        ({"choice": [SURROGATE]}, "must be"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, str(MAX_CHOICES)),
        ({"choice": ["a" * 65_537]}, "65536"),
        ({"choice": ["a" * 60_000, "b" * 60_000] * 3}, str(MAX_GRAMMAR_BYTES)),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "start"}, "must be"),
        ({"grammar": '{"grammars": []}'}, "must be"),
        ({"grammar": "root ::= nowhere"}, "nowhere"),
        ({"grammar": 'start: "' + "a" * MAX_GRAMMAR_BYTES + '"'}, str(MAX_GRAMMAR_BYTES)),
        ({"structural_tag": "{"}, "not JSON"),
        ({"structural_tag": "[]"}, "object"),
        ({"structural_tag": {}}, "structures"),
        ({"structural_tag": TAG | {"format": {}}}, "format"),
        ({"structural_tag": TAG | {"type": "json"}}, "type"),
        ({"structural_tag": TAG | {"triggers": []}}, "trigger"),
        ({"structural_tag": TAG | {"triggers": ["", 3]}}, "triggers"),
        ({"structural_tag": TAG | {"structures": [{"begin": "x"}]}}, "schema"),
        ({"structural_tag": TAG | {"structures": TAG["structures"] * 200}}, str(MAX_STRUCTURES)),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, str(MAX_SCHEMA_DEPTH)),
        ({"json": json.dumps(nested(MAX_SCHEMA_DEPTH + 1))}, str(MAX_SCHEMA_DEPTH)),
        ({"json": '{"items":' * 20_000 + "{}" + "}" * 20_000}, "must be"),
        ({"json": {"const": "x" * MAX_GRAMMAR_BYTES}}, str(MAX_GRAMMAR_BYTES)),
        ({"json": '"' + "x" * MAX_GRAMMAR_BYTES + '"'}, str(MAX_GRAMMAR_BYTES)),
        ({"json": {"type": "integer", "multipleOf": 99_999_989}}, "multipleOf"),
        ({"json": {"properties": {str(i): {} for i in range(1001)}}}, "1000"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_few_words(
    params: dict[str, Any], words: str
) -> None:
    translator = GrammarTranslator()
    for _ in range(3):
        with pytest.raises(InvalidParameterError, match=words) as caught:
            translator.translate(StructuredOutputsParams(**params))
        assert caught.value.parameter == f"structured_outputs.{next(iter(params))}"
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
        assert accepts(translator.translate(StructuredOutputsParams(regex="a")).text, "a")


@pytest.mark.parametrize(
    "params",
    [
        {"whitespace_pattern": "x" * 9000},
        {"whitespace_pattern": "("},
        {"whitespace_pattern": " ", "disable_any_whitespace": True},
    ],
)
def test_a_whitespace_pattern_is_named_where_it_is_at_fault(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        translate(json=PERSON, **params)
    assert caught.value.parameter == "structured_outputs.whitespace_pattern"


@pytest.mark.parametrize(
    "params",
    [
        {"json": nested(MAX_SCHEMA_DEPTH)},
        {"json": "true"},
        {"choice": [str(i) for i in range(MAX_CHOICES)]},
        {"choice": ["a" * 65_536]},
        {"regex": "a" * 8192},
        {
            "json": {
                "title": "x",
                "$schema": "http://json-schema.org/draft-07/schema#",
                "my-note": 1,
            }
        },
        {"json": {"not": {}, "x-guidance": {"lenient": True}}},
    ],
)
def test_what_is_within_its_bounds_is_taken(params: dict[str, Any]) -> None:
    assert translate(**params)


# ---- the cache


def test_what_was_checked_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    translator = GrammarTranslator()
    first = translator.translate(StructuredOutputsParams(json=PERSON))
    monkeypatch.setattr(structured, "_find_problem", lambda text: pytest.fail("checked again"))
    assert translator.translate(StructuredOutputsParams(json=copy.deepcopy(PERSON))) is first


def test_options_are_part_of_what_was_checked() -> None:
    translator = GrammarTranslator()
    params = [
        StructuredOutputsParams(json=PERSON),
        StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
        StructuredOutputsParams(json=PERSON, disable_additional_properties=True),
    ]
    assert len({translator.translate(one).text for one in params}) == 3


def test_the_cache_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(text: str) -> str:
        checked.append(text)
        return ""

    monkeypatch.setattr(structured, "_find_problem", check)
    translator = GrammarTranslator(cache_bytes=20_000)
    for number in [*range(1000), 999, 0]:
        translator.translate(StructuredOutputsParams(regex=str(number)))
        assert translator.num_cached < 50
    assert len(checked) == 1001  # 999 was there, 0 was not


def test_a_panic_while_checking_is_an_error_of_the_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: object, **options: object) -> str:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(LLMatcher, "validate_grammar", staticmethod(panic), raising=False)
    with pytest.raises(InvalidParameterError, match="index out of bounds"):
        translate(regex="a")
