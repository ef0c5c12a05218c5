"""What a grammar may cost, and how one that costs more is found before anything is built from it.

The grammar engine (llguidance) counts fuel while it works. That bounds most grammars; the others
are bounded here, by numbers that can be read off the text. Each bound stands for a grammar of a few
bytes to some kilobytes that took seconds, gigabytes or the stack without it; real ones stay far
below. Client and core check the same: the client in the user's words, the core because a client
might not have.

With all of them a grammar compiles within about 2 s and a mask takes at most about 100 ms, on one
core and a vocabulary of 32,000 tokens; ordinary schemas take a thousandth of that. The exception is
a Lark grammar that is ambiguous without end, such as `e: e e | e e | ...`: hundreds of alternatives
of that kind take up to 2 s for a mask before the engine's own limits end the request. No number in
the text tells it from the grammar of a programming language.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import msgspec

from footplate.protocol.bounds import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH

# Arguments of `LLParserLimits`, in its units. Verbose errors would repeat the output so far.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}

# A chain of 25,000 references fits into 256 KiB of text and recurses to 200 MiB of stack. The
# memory of a stack is only taken when it is used.
STACK_BYTES = 256 * 1024 * 1024

MAX_SCHEMA_PROPERTIES = 1_000  # of one object: optional ones cost their number squared
MAX_SCHEMA_STRING_BYTES = 65_536  # forced text is tokenised again for every mask
MAX_LENGTH = 2**32 - 1  # `maxLength`; the engine counts in 32 bits
MAX_REGEX_BYTES = 8_192
MAX_CLASSES = 4_096  # `\w` takes 3 KiB of memory, wherever it stands
MAX_FOLDED_CLASSES = 50  # without regard to case each of them takes up to 16 ms
# The least common multiple of all `multipleOf`s of a schema, counted in their last digit: the
# automaton has as many states.
MAX_MULTIPLE = 20_000
# The sum over all expressions of their number of optional parts, squared: steps from one state to
# the next, at about 15 ns.
MAX_OPTIONAL_WORK = 6_000_000
MAX_TERMINAL_CHARS = 100_000_000  # of all terminals of a grammar, written out


class GrammarLimitError(ValueError):
    """A bound is exceeded; the message says which: "at most 1000 properties in an object"."""


def start_deep_thread(thread: threading.Thread) -> None:
    """Start `thread` with `STACK_BYTES` of stack, for work on grammars: the engine recurses along
    their references."""
    before = threading.stack_size(STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(before)


def check_grammar(text: str) -> None:
    """Check a grammar in llguidance's own language: Lark, or JSON with a list of grammars.

    Raises:
        GrammarLimitError: it could cost more than it may.
    """
    if len(text) > 2 * MAX_GRAMMAR_BYTES:
        raise GrammarLimitError(f"at most {2 * MAX_GRAMMAR_BYTES} characters")
    if not text.lstrip().startswith("{"):
        _check_lark(text)
        return
    try:
        grammars = msgspec.json.decode(text)["grammars"]
        parts = [(part.get("json_schema"), part.get("lark_grammar")) for part in grammars]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise GrammarLimitError("Lark, or JSON with a list `grammars`") from None
    for schema, lark in parts:
        if schema is not None:
            check_schema(schema)
        if isinstance(lark, str):
            _check_lark(lark)


# ---- JSON schemas


def check_size(value: object) -> None:
    """Check depth and size of a JSON value, also of one that contains itself, without recursion.

    Raises:
        GrammarLimitError: it is nested too deep, or larger than `MAX_GRAMMAR_BYTES`.
    """
    budget = MAX_GRAMMAR_BYTES
    for item, _, depth in _walk(value):
        if depth > MAX_SCHEMA_DEPTH:
            raise GrammarLimitError(f"nested at most {MAX_SCHEMA_DEPTH} levels deep")
        budget -= 1  # any value takes a byte: one that is shared is counted where it is used
        if isinstance(item, str):
            budget -= len(item)
        elif isinstance(item, dict):
            budget -= sum(len(key) for key in item if isinstance(key, str))
        if budget < 0:
            raise GrammarLimitError(f"at most {MAX_GRAMMAR_BYTES} bytes")


def check_schema(schema: object) -> None:
    """Check a JSON schema. It is read as text, not understood: data that looks like a keyword
    counts as one.

    Raises:
        GrammarLimitError: it could cost more than it may.
    """
    check_size(schema)
    regexes: list[str] = []
    multiples: set[Decimal] = set()
    for item, key, _ in _walk(schema):
        if isinstance(item, str):
            if key in ("pattern", "whitespace_pattern"):
                regexes.append(item)
            elif key not in _PROSE and len(item.encode()) > MAX_SCHEMA_STRING_BYTES:
                raise GrammarLimitError(f"strings of at most {MAX_SCHEMA_STRING_BYTES} bytes")
        elif key == "properties" and isinstance(item, dict) and len(item) > MAX_SCHEMA_PROPERTIES:
            raise GrammarLimitError(
                f"at most {MAX_SCHEMA_PROPERTIES} properties in an object, not {len(item)}"
            )
        elif key == "patternProperties" and isinstance(item, dict):
            regexes += item
        elif key == "multipleOf" and isinstance(item, int | float):
            multiples.add(Decimal(str(item)))
        elif key in _LENGTHS and isinstance(item, int | float) and item > MAX_LENGTH:
            raise GrammarLimitError(f"{key} of at most {MAX_LENGTH}")
    _check_multiples(multiples)
    _check_regexes(regexes)


_LENGTHS = ("minLength", "maxLength")
_PROSE = ("description", "title", "$comment")


def _walk(value: object) -> Iterator[tuple[object, str, int]]:
    """All values in a JSON value, with the key of the dictionary that holds it and its depth."""
    stack: list[Iterator[tuple[str, object]]] = [iter([("", value)])]
    while stack:
        for key, item in stack[-1]:
            yield item, key, len(stack) - (not isinstance(item, dict | list | tuple))
            if isinstance(item, dict):
                stack.append(iter(item.items()))
                break
            if isinstance(item, list | tuple):
                # A list is transparent to keywords: `"pattern": ["..."]` is none.
                stack.append(iter([("", part) for part in item]))
                break
        else:
            stack.pop()


def _check_multiples(multiples: set[Decimal]) -> None:
    if any(not value.is_finite() for value in multiples):
        raise GrammarLimitError("finite numbers")
    digits = [value.as_tuple() for value in multiples if value > 0]
    scale = max([0, *(-int(parts.exponent) for parts in digits)])
    for value in multiples:
        # Before the power is computed: 1e308 and 1e-308 are numbers, too.
        if value > 0 and value.adjusted() + scale > len(str(MAX_MULTIPLE)):
            raise GrammarLimitError(_MULTIPLES)
    if math.lcm(*(int(value.scaleb(scale)) for value in multiples if value > 0)) > MAX_MULTIPLE:
        raise GrammarLimitError(_MULTIPLES)


_MULTIPLES = (
    f"`multipleOf`s whose least common multiple, in units of their last digit, is at most "
    f"{MAX_MULTIPLE}"
)


# ---- regular expressions and Lark


def check_regex(regex: str) -> None:
    """Check a regular expression.

    Raises:
        GrammarLimitError: it could cost more than it may.
    """
    _check_regexes([regex])


def _check_regexes(regexes: list[str]) -> None:
    if any(len(regex.encode()) > MAX_REGEX_BYTES for regex in regexes):
        raise GrammarLimitError(f"regular expressions of at most {MAX_REGEX_BYTES} bytes")
    num_classes = sum(len(_CLASS.findall(regex)) for regex in regexes)
    _check_classes(num_classes, any(map(_IGNORES_CASE.search, regexes)))
    _check_optional_work(len(_OPTIONAL.findall(regex)) for regex in regexes)


def _check_lark(text: str) -> None:
    for match in _EMBEDDED_SCHEMA.finditer(text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, match.end())
        except RecursionError:
            raise GrammarLimitError(f"nested at most {MAX_SCHEMA_DEPTH} levels deep") from None
        except ValueError:
            continue  # the engine says what is wrong with it, and where
        check_schema(schema)
    # Strings and comments hold no operators; regular expressions do.
    text = _LARK_LITERAL.sub(lambda match: match[1] or '"x"' if len(match[0]) > 2 else '""', text)
    _check_classes(len(_CLASS.findall(text)), bool(_IGNORES_CASE.search(text)))
    starts = [match.start() for match in _DEFINITION.finditer(text)]
    bodies: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(text)], strict=False):
        head = _DEFINITION.match(text, start)
        assert head is not None
        bodies[head[1]] = text[head.end() : end]
    terminals = {name for name in bodies if name.isupper()}
    references = {
        name: [word for word in _NAME.findall(bodies[name]) if word in terminals]
        for name in terminals
    }
    # A terminal is one regular expression with all that it refers to, as often as it does; a rule
    # is not.
    length = _expand({name: len(bodies[name]) for name in terminals}, references)
    if sum(length.values()) > MAX_TERMINAL_CHARS:
        raise GrammarLimitError(
            f"terminals of at most {MAX_TERMINAL_CHARS} characters, with all that they refer to"
        )
    optional = {name: len(_OPTIONAL.findall(body)) for name, body in bodies.items()}
    _check_optional_work(optional.values())
    _check_optional_work(_expand(optional, references).values())


def _expand(sizes: dict[str, int], references: dict[str, list[str]]) -> dict[str, int]:
    """Sizes of terminals together with those that they refer to."""
    expanded: dict[str, int] = {}
    for name in references:
        path, entered = [name], set[str]()
        while path:
            top = path[-1]
            # A terminal that contains itself is an error, which the engine words.
            missing = [r for r in set(references[top]) if r not in expanded and r not in entered]
            entered.add(top)
            if missing and top not in expanded:
                path += missing
                continue
            path.pop()
            total = sizes[top] + sum(expanded.get(r, 0) for r in references[top])
            # Sizes that double from one terminal to the next would have no end of digits.
            expanded[top] = min(total, MAX_TERMINAL_CHARS + 1)
    return expanded


def _check_classes(num_classes: int, ignores_case: bool) -> None:
    if num_classes > MAX_CLASSES:
        raise GrammarLimitError(f"at most {MAX_CLASSES} character classes")
    if ignores_case and num_classes > MAX_FOLDED_CLASSES:
        raise GrammarLimitError(
            f"at most {MAX_FOLDED_CLASSES} character classes where case is ignored"
        )


def _check_optional_work(counts: Iterable[int]) -> None:
    if sum(count**2 for count in counts) > MAX_OPTIONAL_WORK:
        raise GrammarLimitError(
            f"fewer optional parts: their number in each expression, squared, adds up to more "
            f"than {MAX_OPTIONAL_WORK}"
        )


_CLASS = re.compile(r"\[|\\[wWdDsSpPbB]")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i|/[a-z]*i")
# What may be absent: repetition, brackets in Lark, complements, and empty alternatives.
_OPTIONAL = re.compile(r"[?*{\[~]|\|\s*\)|\(\s*\||\|\s*\||\"\"")
_LARK_LITERAL = re.compile(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"|(/(?:[^/\\\n]|\\.)+/[a-z]*)')
_EMBEDDED_SCHEMA = re.compile(r"%json\s*(?=\{)")
_DEFINITION = re.compile(
    r"""^[ \t]*[?!]?([A-Za-z_]\w*)[ \t]*(?:\[(?:"[^"\n]*"|[^]"\n])*\])?(?:\.-?\d+|::\w+)?[ \t]*:""",
    re.MULTILINE,
)
_NAME = re.compile(r"\b[A-Za-z_]\w*")
