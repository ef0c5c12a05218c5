"""What a request's output must look like: `StructuredOutputsParams`, as the user writes it."""

from typing import Any

import msgspec

from footplate.protocol.bounds import require_bool
from footplate.protocol.errors import InvalidParameterError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class StructuredOutputsParams(msgspec.Struct, kw_only=True, frozen=True):
    """Exactly one of the first six; names and meanings are vLLM's.

    Attributes:
        json: a JSON schema, as a dictionary or as text. Keywords that cannot be enforced are an
            error, unless the schema has `"x-guidance": {"lenient": true}`; words that JSON Schema
            does not know are ignored.
        regex: a regular expression, in the syntax of Rust's regex crate (no look-around, no
            back-references), that the whole output matches.
        choice: the output is one of these strings.
        grammar: a context-free grammar in Lark's syntax, with the rule `start`, or in GBNF (with
            `::=`), with the rule `root`.
        json_object: True: any JSON object.
        structural_tag: free text in which each of some tags, once begun, goes on by a schema:
            a dictionary, or its JSON, with `structures` (a list of `begin`, `schema`, `end`) and
            `triggers` (prefixes of the `begin`s).
        disable_any_whitespace: JSON without whitespace between its parts. Like the next two it
            concerns JSON alone.
        disable_additional_properties: objects whose schema names properties have no others, unless
            it says so.
        whitespace_pattern: what stands between the parts of JSON, as a regular expression. Not
            together with `disable_any_whitespace`.

    Raises:
        InvalidParameterError: none or several of the six, or a value of the wrong type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InvalidParameterError(
                "structured_outputs", given, f"exactly one of {', '.join(KINDS)}"
            )
        for name, kinds in _TYPES.items():
            if not isinstance(getattr(self, name), kinds):
                raise InvalidParameterError(
                    f"structured_outputs.{name}", getattr(self, name), _type_names(kinds)
                )
        if self.json_object is False:
            raise InvalidParameterError("structured_outputs.json_object", False, "True or None")
        if self.choice is not None and not (
            self.choice and all(isinstance(item, str) and item for item in self.choice)
        ):
            raise InvalidParameterError(
                "structured_outputs.choice", self.choice, "a list of non-empty strings"
            )
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            require_bool(f"structured_outputs.{name}", getattr(self, name))

    @property
    def kind(self) -> str:
        """Which of the six it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "json": (str, dict, _NONE),
    "regex": (str, _NONE),
    "choice": (list, tuple, _NONE),
    "grammar": (str, _NONE),
    "json_object": (bool, _NONE),
    "structural_tag": (str, dict, _NONE),
    "whitespace_pattern": (str, _NONE),
}


def _type_names(kinds: tuple[type, ...]) -> str:
    return " or ".join("None" if kind is _NONE else kind.__name__ for kind in kinds)
