"""Changes to JSON schemas before the grammar engine sees them. In place."""

import math
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def subschemas(schema: object) -> Iterator[Schema]:
    """A schema and all those inside of it.

    Follows the keywords that hold schemas. Data (`enum`, `const`, `default`, ...) and properties
    that are named like a keyword are none.
    """
    schemas = [schema]
    while schemas:
        current = schemas.pop()
        if not isinstance(current, dict):
            continue
        for keyword, value in current.items():
            if keyword in _HOLDS_SCHEMAS_BY_NAME and isinstance(value, dict):
                schemas += value.values()
            elif keyword in _HOLDS_SCHEMAS:
                schemas += value if isinstance(value, list) else [value]
        yield current


def close_objects(schema: object) -> None:
    """Set `additionalProperties` to false wherever a schema names properties and says nothing about
    others: vLLM's rule. A schema that names none stays open."""
    for part in subschemas(schema):
        if "properties" in part or "patternProperties" in part:
            part.setdefault("additionalProperties", False)


def tighten_exclusive_bounds(schema: object) -> None:
    """Say "above 89" as "from 89.000000001 on" where all numbers between the bounds begin with the
    same digits before the point: there llguidance 1.9 forgets that 89 itself is excluded."""
    for part in subschemas(schema):
        low, high = _number(part, "exclusiveMinimum"), _number(part, "exclusiveMaximum")
        least, most = _number(part, "minimum"), _number(part, "maximum")
        if low is not None and _is_next_step(low, min(_given(high, most), default=low)):
            del part["exclusiveMinimum"]
            part["minimum"] = max(_given(least, _next_to(low, low + 1)))
        elif high is not None and _is_next_step(high, max(_given(low, least), default=high)):
            del part["exclusiveMaximum"]
            part["maximum"] = min(_given(most, _next_to(high, high - 1)))


def _number(part: Schema, keyword: str) -> float | None:
    value = part.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _given(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def _is_next_step(bound: float, other: float) -> bool:
    return bound == math.floor(bound) and 0 < abs(other - bound) < 1


def _next_to(value: float, towards: float) -> float:
    # Not the next double: the engine takes bounds apart in floating point.
    return value + math.copysign(max(1e-9, abs(value) * 1e-12), towards - value)


_HOLDS_SCHEMAS_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
_HOLDS_SCHEMAS = frozenset(
    {
        "items",
        "prefixItems",
        "additionalItems",
        "unevaluatedItems",
        "contains",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
    }
)
