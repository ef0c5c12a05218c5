"""GBNF, llama.cpp's notation for grammars, and its relatives with `::=`, translated to Lark.

Time is linear in the text. Rules that refer to no recursive rule become terminals, and so do runs
of them inside other rules: a terminal is one automaton, and between its parts the lexer needs to
find no border. Newlines are space, so alternatives may stand on lines of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 20  # of parentheses; the engine takes no more in Lark


class GbnfError(ValueError):
    """The text is no GBNF; the message says where and why."""


def is_gbnf(text: str) -> bool:
    """Whether a grammar has rules with `::=`; in Lark they have a colon."""
    return re.search(r"^[ \t]*[\w-]+\s*::=", text, re.MULTILINE) is not None


def gbnf_to_lark(text: str) -> str:
    """Translate a grammar whose first rule is called `root`.

    Raises:
        GbnfError: with line and reason.
    """
    rules = _Parser(text).parse()
    if "root" not in rules:
        raise GbnfError("there is no rule `root`")
    for name, node in rules.items():
        for reference in _references(node):
            if reference not in rules:
                raise GbnfError(f"rule `{name}` refers to `{reference}`, which does not exist")
    return _Writer(rules).write()


def lark_string(text: str) -> str:
    """A string in Lark. Its lexer takes no control characters, not even those that JSON does."""
    quoted = json.dumps(text, ensure_ascii=False)
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)


_CONTROL = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


# ---- what a rule is made of


@dataclass(frozen=True, slots=True)
class Terminal:
    """Text or a character class, as Lark writes it."""

    lark: str


@dataclass(frozen=True, slots=True)
class Reference:
    """Another rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One part after the other."""

    parts: list[Node]


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One of the parts."""

    parts: list[Node]


@dataclass(frozen=True, slots=True)
class Repetition:
    """A part, again and again; `suffix` as Lark writes it."""

    part: Node
    suffix: str


Node = Terminal | Reference | Sequence | Alternatives | Repetition


def _references(node: Node) -> Iterator[str]:
    match node:
        case Reference(name):
            yield name
        case Sequence(parts) | Alternatives(parts):
            for part in parts:
                yield from _references(part)
        case Repetition(part, _):
            yield from _references(part)


# ---- reading

_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*
    (?: (?P<define> [\w-]+ (?=\s*::=)) \s*::=
      | (?P<name> [\w-]+)
      | (?P<string> "(?:[^"\\]|\\.)*")
      | (?P<chars> \[(?:[^]\\]|\\.)*\])
      | (?P<repeat> [*+?] | \{\s*\d+\s*(?:,\s*\d*\s*)?\})
      | (?P<mark> [().|])
      | (?P<end> \Z) )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._end = 0
        self._depth = 0
        self._advance()

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._end)
        if match is None:
            raise self._error("this is no part of a rule")
        self._end = match.end()
        self._kind = match.lastgroup or ""
        self._token = match[self._kind]

    def _error(self, why: str) -> GbnfError:
        line = self._text.count("\n", 0, self._end) + 1
        rest = self._text[self._end : self._end + 20].split("\n")[0]
        return GbnfError(f"line {line}, before {rest!r}: {why}")

    def parse(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._kind != "end":
            if self._kind != "define":
                raise self._error("a rule begins with its name and `::=`")
            name = self._token
            if name in rules:
                raise self._error(f"there are two rules `{name}`")
            self._advance()
            rules[name] = self._alternatives()
        return rules

    def _alternatives(self) -> Node:
        parts = [self._sequence()]
        while self._token == "|" and self._kind == "mark":
            self._advance()
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Alternatives(parts)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while True:
            match self._kind, self._token:
                case ("name", name):
                    parts.append(Reference(name))
                case ("string", token):
                    parts.append(Terminal(lark_string(_unescape(token[1:-1]))))
                case ("chars", token):
                    parts.append(Terminal(self._character_class(token)))
                case ("mark", "."):
                    parts.append(Terminal("/(?s:.)/"))
                case ("mark", "("):
                    parts.append(self._group())
                case ("repeat", token):
                    if not parts:
                        raise self._error("there is nothing to repeat")
                    parts[-1] = Repetition(parts[-1], "".join(token.split()))
                case _:
                    return parts[0] if len(parts) == 1 else Sequence(parts)
            self._advance()

    def _group(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"parentheses are nested more than {MAX_DEPTH} deep")
        self._advance()
        inner = self._alternatives()
        if (self._kind, self._token) != ("mark", ")"):
            raise self._error("a parenthesis is not closed")
        self._depth -= 1
        return inner

    def _character_class(self, token: str) -> str:
        body = token[1:-1]
        negated = body.startswith("^")
        # A hyphen makes a range where it is not escaped, not first and not last.
        items = [(m[0], _unescape(m[0])) for m in _ITEM.finditer(body, int(negated))]
        if not items:
            raise self._error("a character class is empty")
        written = [
            "-" if raw == "-" and 0 < index < len(items) - 1 else f"\\x{{{ord(character):x}}}"
            for index, (raw, character) in enumerate(items)
        ]
        return f"/[{'^' if negated else ''}{''.join(written)}]/"


_ITEM = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|.", re.DOTALL)


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if letter := match[4]:
            return _LETTERS.get(letter, letter)
        code = int(match[1] or match[2] or match[3], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise GbnfError(f"{match[0]} is no character")
        return chr(code)

    return _ESCAPE.sub(replace, text)


# ---- writing


class _Writer:
    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._terminals = _find_terminals(rules)
        self._names = {name: self._name(number, name) for number, name in enumerate(rules)}
        self._runs: dict[str, str] = {}

    def _name(self, number: int, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]", "_", name.lower())
        return f"T{number}_{plain.upper()}" if name in self._terminals else f"r{number}_{plain}"

    def write(self) -> str:
        lines = ["%llguidance {}", f"start: {self._names['root']}"]
        for name, node in self._rules.items():
            lines.append(f"{self._names[name]}: {self._write(node, name in self._terminals)}")
        lines += [f"{name}: {run}" for run, name in self._runs.items()]
        return "\n".join(lines) + "\n"

    def _write(self, node: Node, in_terminal: bool) -> str:
        match node:
            case Terminal(lark):
                return lark
            case Reference(name):
                return self._names[name]
            case Repetition(part, suffix):
                return f"({self._write(part, in_terminal)}){suffix}"
            case Alternatives(parts):
                return "(" + " | ".join(self._write(part, in_terminal) for part in parts) + ")"
            case Sequence(parts):
                return self._write_sequence(parts, in_terminal) or '""'

    def _write_sequence(self, parts: list[Node], in_terminal: bool) -> str:
        if in_terminal:
            return " ".join(self._write(part, True) for part in parts)
        written: list[str] = []
        run: list[str] = []
        for part in [*parts, None]:
            if part is not None and all(name in self._terminals for name in _references(part)):
                run.append(self._write(part, True))
                continue
            if len(run) > 1:
                text = " ".join(run)
                written.append(self._runs.setdefault(text, f"RUN_{len(self._runs)}"))
            else:
                written += run
            run = []
            if part is not None:
                written.append(self._write(part, False))
        return " ".join(written)


def _find_terminals(rules: dict[str, Node]) -> set[str]:
    """Rules that lead to no recursive one (Kahn's algorithm, from the leaves)."""
    missing = {name: set(_references(node)) for name, node in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, references in missing.items():
        for reference in references:
            users[reference].append(name)
    ready = [name for name, references in missing.items() if not references]
    found = set()
    while ready:
        name = ready.pop()
        found.add(name)
        for user in users[name]:
            missing[user].discard(name)
            if not missing[user]:
                ready.append(user)
    return found
