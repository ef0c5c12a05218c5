"""JSON schemas as people write them, from a seed: nested, referring to each other, with bounds."""

from random import Random
from typing import Any

Schema = dict[str, Any]

NAMES = [
    "a",
    "b",
    "id",
    "name",
    "größe",
    "名前",
    "ключ",
    "x-y",
    "with space",
    'quo"te',
    "back\\slash",
]
STRINGS = ["", "a", "red", "grün", "日本", "🙂", 'say "hi"', "line\nbreak", "tab\t", "\\", "/"]
PATTERNS = [
    "^[a-z]+$",
    "^[A-Z]{2}[0-9]{3}$",
    "^(ja|nein)$",
    "^.{1,5}$",
    "^[^x]*$",
    "^\\d{4}-\\d\\d$",
]


def random_schema(seed: int) -> Schema:
    """A schema that some JSON text matches."""
    rng = Random(seed)
    names = [f"def{i}" for i in range(rng.randrange(3))]
    schema = _schema(rng, 3, names)
    if names:
        # What a definition refers to itself is optional in it, so that texts can end.
        schema["$defs"] = {name: _definition(rng, names) for name in names}
    return schema


def _definition(rng: Random, names: list[str]) -> Schema:
    schema = _object(rng, 1, [])
    schema["properties"]["next"] = {"$ref": f"#/$defs/{rng.choice(names)}"}
    schema["properties"]["list"] = {
        "type": "array",
        "items": {"$ref": f"#/$defs/{rng.choice(names)}"},
        "maxItems": 2,
    }
    return schema


def _schema(rng: Random, depth: int, names: list[str]) -> Schema:
    kinds = [_string, _integer, _number, _enum, _const, _simple]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of]
    if names and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    return rng.choice(kinds)(rng, depth, names)


def _object(rng: Random, depth: int, names: list[str]) -> Schema:
    keys = rng.sample(NAMES, rng.randrange(1, 5))
    schema: Schema = {
        "type": "object",
        "properties": {key: _schema(rng, depth - 1, names) for key in keys},
        "required": [key for key in keys if rng.random() < 0.5],
    }
    match rng.randrange(3):
        case 0:
            schema["additionalProperties"] = False
        case 1:
            schema["additionalProperties"] = _schema(rng, 0, [])
    return schema


def _array(rng: Random, depth: int, names: list[str]) -> Schema:
    schema: Schema = {"type": "array", "items": _schema(rng, depth - 1, names)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_schema(rng, 0, names) for _ in range(rng.randrange(1, 3))]
    if rng.random() < 0.5:
        schema["minItems"] = rng.randrange(3)
    if rng.random() < 0.5:
        schema["maxItems"] = rng.randrange(3, 6)
    return schema


def _any_of(rng: Random, depth: int, names: list[str]) -> Schema:
    return {"anyOf": [_schema(rng, depth - 1, names) for _ in range(rng.randrange(2, 4))]}


def _string(rng: Random, depth: int, names: list[str]) -> Schema:
    match rng.randrange(4):
        case 0:
            low = rng.randrange(4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(10)}
        case 1:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 2:
            return {"type": "string", "format": rng.choice(["date", "uuid", "date-time", "ipv4"])}
        case _:
            return {"type": "string"}


def _integer(rng: Random, depth: int, names: list[str]) -> Schema:
    low = rng.randrange(-1000, 1000)
    schema: Schema = {"type": "integer"}
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randrange(20, 10_000)
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice([2, 5, 7, 10])
    return schema


def _number(rng: Random, depth: int, names: list[str]) -> Schema:
    low = round(rng.uniform(-100, 100), rng.randrange(4))
    schema: Schema = {"type": "number"}
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([0.5, 7, 1e6])
    return schema


def _enum(rng: Random, depth: int, names: list[str]) -> Schema:
    values: list[Any] = [*rng.sample(STRINGS, 3), rng.randrange(-9, 99), 2.5, True, None]
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _const(rng: Random, depth: int, names: list[str]) -> Schema:
    return {"const": rng.choice([*STRINGS, 0, -1.5, False, None, [1, "ä"], {"k": [None]}])}


def _simple(rng: Random, depth: int, names: list[str]) -> Schema:
    kinds = ["boolean", "null", "string", "integer", "number"]
    return {"type": rng.choice([rng.choice(kinds), rng.sample(kinds, 2)])}
