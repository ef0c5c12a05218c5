"""From `StructuredOutputsParams` to one grammar in the engine core's language, checked.

Everything is refused here that can be known without the model, in the user's words; what remains
is a special token in a Lark grammar that the model does not have, and a grammar so ambiguous that
only its first mask shows it. Both end the request with `ErrorKind.GRAMMAR`.

JSON schemas mean what llguidance makes of them: a keyword of JSON Schema that it cannot enforce
(`not`, `if`, `uniqueItems`, `contains`, `propertyNames`, `dependentRequired`, an unknown `format`,
a `oneOf` whose branches overlap) is an error that names it, as in vLLM with this backend. Words
that JSON Schema does not know are annotations, as the standard has it, and are ignored. A schema
with `"x-guidance": {"lenient": true}` asks for the former to be ignored, too.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from footplate.frontend.gbnf import GbnfError, gbnf_to_lark, is_gbnf, lark_string
from footplate.frontend.json_schema import close_objects, tighten_exclusive_bounds
from footplate.protocol.bounds import MAX_GRAMMAR_BYTES
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.grammar_limits import (
    MAX_SCHEMA_STRING_BYTES,
    PARSER_LIMITS,
    GrammarLimitError,
    check_grammar,
    check_regex,
    check_size,
    start_deep_thread,
)
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import Grammar

MAX_CHOICES = 10_000
MAX_STRUCTURES = 256
CACHE_BYTES = 16 * 1024 * 1024


class GrammarTranslator:
    """Translates and checks; owns a cache of what passed, bounded in bytes.

    May take up to some seconds for the worst grammars that pass the bounds, under a millisecond
    for ordinary ones: not for the event loop. Several threads may use it.

    Args:
        special_tokens: the model's, as text. A trigger of a structural tag that is one of them
            means the token, any other its characters.
    """

    def __init__(self, special_tokens: Collection[str] = (), cache_bytes: int = CACHE_BYTES):
        self._special_tokens = frozenset(special_tokens)
        self._lock = threading.Lock()
        self._room = cache_bytes
        self._cache: OrderedDict[bytes, Grammar] = OrderedDict()

    def translate(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar that an output has to match.

        Raises:
            InvalidParameterError: what was given is malformed, too large, or cannot be enforced.
        """
        kind = params.kind
        try:
            _check_bounds(params)
            key = msgspec.json.encode(params)
            with self._lock:
                if grammar := self._cache.get(key):
                    self._cache.move_to_end(key)
                    return grammar
            grammar = Grammar(_TRANSLATIONS[kind](params, self._special_tokens))
            check_grammar(grammar.text)
            if problem := _find_problem(grammar.text):
                raise _UnusableError(problem)
        except InvalidParameterError:
            raise
        except GrammarLimitError as error:
            raise _refusal(params, f"smaller: {error}") from None
        except (_UnusableError, GbnfError, TypeError, ValueError, RecursionError) as error:
            reason = _one_line(str(error))
            raise _refusal(
                params, f"{_DESCRIPTIONS[kind]} that can be compiled ({reason})"
            ) from None
        self._keep(key, grammar)
        return grammar

    @property
    def num_cached(self) -> int:
        """Grammars that would not be checked again."""
        return len(self._cache)

    def _keep(self, key: bytes, grammar: Grammar) -> None:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = grammar
                self._room -= _cost(key, grammar)
            while self._room < 0:
                oldest, forgotten = self._cache.popitem(last=False)
                self._room += _cost(oldest, forgotten)


class _UnusableError(Exception):
    """The grammar engine's own words."""


def _cost(key: bytes, grammar: Grammar) -> int:
    return len(key) + 4 * len(grammar.text) + 512  # text takes up to 4 bytes per character


# ---- before anything is built


def _check_bounds(params: StructuredOutputsParams) -> None:
    value = getattr(params, params.kind)
    if isinstance(value, str) and len(value.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarLimitError(f"at most {MAX_GRAMMAR_BYTES} bytes")
    if isinstance(value, dict):
        check_size(value)
    if isinstance(value, list | tuple):
        if len(value) > MAX_CHOICES:
            raise GrammarLimitError(f"at most {MAX_CHOICES} choices")
        if any(len(choice.encode()) > MAX_SCHEMA_STRING_BYTES for choice in value):
            raise GrammarLimitError(f"choices of at most {MAX_SCHEMA_STRING_BYTES} bytes")
        if sum(len(choice.encode()) for choice in value) > MAX_GRAMMAR_BYTES:
            raise GrammarLimitError(f"at most {MAX_GRAMMAR_BYTES} bytes")
    if params.regex is not None:
        check_regex(params.regex)
    if params.whitespace_pattern is not None:
        if params.disable_any_whitespace:
            raise InvalidParameterError(
                "structured_outputs.whitespace_pattern",
                _excerpt(params.whitespace_pattern),
                "None where disable_any_whitespace is set",
            )
        try:
            check_regex(params.whitespace_pattern)
            if problem := _find_problem(_regex_grammar(params.whitespace_pattern)):
                raise _UnusableError(f"a regular expression ({_one_line(problem)})")
        except (GrammarLimitError, _UnusableError) as error:
            smaller = "smaller: " if isinstance(error, GrammarLimitError) else ""
            raise InvalidParameterError(
                "structured_outputs.whitespace_pattern",
                _excerpt(params.whitespace_pattern),
                f"{smaller}{error}",
            ) from None


# ---- one function for each kind

Translation = Callable[[StructuredOutputsParams, frozenset[str]], str]


def _from_json(params: StructuredOutputsParams, _: frozenset[str]) -> str:
    return _wrap(json_schema=_prepare_schema(_parse(params.json), params))


def _from_json_object(params: StructuredOutputsParams, _: frozenset[str]) -> str:
    return _wrap(json_schema=_prepare_schema({"type": "object"}, params))


def _from_regex(params: StructuredOutputsParams, _: frozenset[str]) -> str:
    assert params.regex is not None
    return _regex_grammar(params.regex)


def _regex_grammar(regex: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def _from_choice(params: StructuredOutputsParams, _: frozenset[str]) -> str:
    # One terminal, not a rule of many: the automaton has no limit on alternatives as rows have.
    choices = " | ".join(dict.fromkeys(lark_string(choice) for choice in params.choice or ()))
    return f"start: CHOICE\nCHOICE: {choices}\n"


def _from_grammar(params: StructuredOutputsParams, _: frozenset[str]) -> str:
    text = params.grammar or ""
    if is_gbnf(text):
        return gbnf_to_lark(text)
    # Text that begins with a brace would be taken for a list of grammars.
    return _wrap(lark_grammar=text)


def _from_structural_tag(params: StructuredOutputsParams, special_tokens: frozenset[str]) -> str:
    """Text is free until one of the triggers; then a tag that begins with it has to follow.

    Of several triggers that a `begin` starts with, the longest counts.
    """
    tag = _parse(params.structural_tag)
    structures, triggers = _read_tag(tag)
    lines = ["%llguidance {}", "start: tag* rest", "rest: TEXT", r"TEXT: /(.|\n)*/"]
    names = {}
    for number, trigger in enumerate(triggers):
        names[trigger] = f"trigger_{number}"
        if trigger in special_tokens and trigger.startswith("<") and trigger.endswith(">"):
            lines.append(f"trigger_{number}: TEXT {trigger}")
        else:
            # Lazy: it ends with the first place where the trigger is complete.
            lines.append(f"trigger_{number}[lazy]: TEXT {lark_string(trigger)}")
    for number, structure in enumerate(structures):
        begin, end = structure["begin"], structure["end"]
        trigger = max((t for t in triggers if begin.startswith(t)), key=len, default="")
        if not trigger:
            raise ValueError(f"no trigger begins {begin[:40]!r}")
        schema = json.dumps(_prepare_schema(structure["schema"], params), ensure_ascii=False)
        parts = [
            names[trigger],
            lark_string(begin[len(trigger) :]),
            f"%json {schema}",
            lark_string(end),
        ]
        lines.append(f"tag_{number}: " + " ".join(part for part in parts if part != '""'))
    lines.append("tag: " + " | ".join(f"tag_{number}" for number in range(len(structures))))
    return "\n".join(lines) + "\n"


def _read_tag(tag: object) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(tag, dict):
        raise ValueError("not a JSON object")
    if unknown := set(tag) - {"type", "structures", "triggers"}:
        raise ValueError(f"unknown key {min(unknown)!r}; there are `structures` and `triggers`")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise ValueError('type is "structural_tag"')
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures:
        raise ValueError("`structures` is a list of at least one tag")
    if len(structures) > MAX_STRUCTURES:
        raise GrammarLimitError(f"at most {MAX_STRUCTURES} structures")
    for structure in structures:
        if not (
            isinstance(structure, dict)
            and set(structure) == {"begin", "schema", "end"}
            and isinstance(structure["begin"], str)
            and isinstance(structure["end"], str)
        ):
            raise ValueError("each of `structures` has `begin`, `schema` and `end`")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise ValueError("`triggers` is a list of non-empty strings")
    return structures, list(dict.fromkeys(triggers))


_TRANSLATIONS: dict[str, Translation] = {
    "json": _from_json,
    "json_object": _from_json_object,
    "regex": _from_regex,
    "choice": _from_choice,
    "grammar": _from_grammar,
    "structural_tag": _from_structural_tag,
}
_DESCRIPTIONS = {
    "json": "a JSON schema",
    "json_object": "a JSON schema",
    "regex": "a regular expression",
    "choice": "choices",
    "grammar": "a grammar in Lark or GBNF",
    "structural_tag": "a structural tag",
}


def _parse(value: str | dict[str, Any] | None) -> Any:
    if isinstance(value, str):
        try:
            parsed = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        check_size(parsed)
        return parsed
    # Through JSON: keys become text, and NaN, objects and the like are found out.
    return json.loads(json.dumps(value, allow_nan=False))


def _wrap(**grammar: object) -> str:
    return json.dumps({"grammars": [grammar]}, ensure_ascii=False)


# ---- schemas


def _prepare_schema(schema: Any, params: StructuredOutputsParams) -> Any:
    if params.disable_additional_properties:
        close_objects(schema)
    tighten_exclusive_bounds(schema)
    if not isinstance(schema, dict):
        return schema  # true, or a mistake that the engine words
    options: dict[str, object] = {}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {**own, **options}} if options else schema


# ---- the grammar engine's opinion


def _find_problem(text: str) -> str:
    """What the engine says against a grammar; empty if nothing. It needs no vocabulary for that,
    and takes 0.1 ms to 2 s, without the GIL."""
    from llguidance import LLMatcher, LLParserLimits

    problem = "the grammar engine failed"

    def validate() -> None:
        nonlocal problem
        try:
            limits = LLParserLimits(**PARSER_LIMITS)
            problem = LLMatcher.validate_grammar(text, limits=limits)
        except BaseException as error:  # a panic in Rust is no Exception
            problem = f"the grammar engine failed: {error}"

    thread = threading.Thread(target=validate, name="grammar check", daemon=True)
    start_deep_thread(thread)
    thread.join()
    return problem


def _one_line(message: str) -> str:
    """The line of a long message that says what is wrong."""
    if message.startswith("panic"):
        return "it is too large for the grammar engine"
    lines = message.splitlines() or [""]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    line = line.removeprefix("error: ").strip()
    return line if len(line) <= 200 else line[:200] + "..."


def _refusal(params: StructuredOutputsParams, requirement: str) -> InvalidParameterError:
    value = getattr(params, params.kind)
    return InvalidParameterError(f"structured_outputs.{params.kind}", _excerpt(value), requirement)


def _excerpt(value: object) -> object:
    """A value for an error message: it may be as large as the mistake."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:80] + "..."
    if isinstance(value, dict):
        return f"<{len(value)} keys: {', '.join(str(key)[:20] for key in list(value)[:5])}>"
    if isinstance(value, list | tuple):
        return f"<{len(value)} choices>"
    return value
