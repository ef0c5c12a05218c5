"""What a caller may hand to a chat template: checked, copied, and in the shape it expects.

Templates get plain data only (None, bool, int, float, str, lists, dicts), rebuilt from scratch:
an object with methods would be a way out of the sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from footplate.protocol.errors import InvalidRequestError

_MAX_DEPTH = 64
# One text under three names: reasoning models' templates do not agree on what to call it.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild `value` from plain data; `where` names it in the error.

    Raises:
        InvalidRequestError: something in it is not plain data, or it is nested too deeply.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enum member, say, without its class
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {
            _key(key, where): plain(item, f"{where}.{key}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{n}]", depth + 1) for n, item in enumerate(value)]
    raise InvalidRequestError(f"{where}: must be plain JSON data, not {type(value).__name__}")


def check_messages(
    messages: Sequence[Mapping[str, Any]], *, wants_parts: bool, wraps_strings: bool
) -> list[dict[str, Any]]:
    """Check `messages` and return copies that fit the template.

    Args:
        wants_parts: the template loops over the content: leave a list of parts a list. Otherwise
            the texts are joined with newlines, as vLLM does.
        wraps_strings: it loops without asking for the type: make a string a list of one part.

    Raises:
        InvalidRequestError: says which message is wrong and how.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequestError("messages: must be a non-empty list")
    checked = []
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where}: must be a dict with a role and a content")
        # APIs send null for what is absent; templates ask whether a key is there.
        fields = {key: value for key, value in plain(message, where).items() if value is not None}
        if not isinstance(fields.get("role"), str) or not fields["role"]:
            raise InvalidRequestError(f"{where}: needs a role, such as 'user'")
        if "content" in fields:
            fields["content"] = _content(
                fields["content"], f"{where}.content", wants_parts, wraps_strings
            )
        elif not any(fields.get(name) for name in ("tool_calls", *_REASONING)):
            raise InvalidRequestError(f"{where}: needs a content")
        if "tool_calls" in fields:
            _parse_arguments(fields["tool_calls"], f"{where}.tool_calls")
        checked.append(_alias_reasoning(fields))
    return checked


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidRequestError(f"{where}: keys must be strings, not {key!r}")
    return str.__str__(key)


def _content(content: Any, where: str, wants_parts: bool, wraps_strings: bool) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if wraps_strings else content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: must be a string or a list of text parts")
    texts = [_text(part, f"{where}[{n}]") for n, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts)


def _text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or "type" not in part:
        raise InvalidRequestError(f"{where}: must be a dict like {{'type': 'text', 'text': ...}}")
    if part["type"] != "text":
        raise InvalidRequestError(
            f"{where}: parts of type {part['type']!r} are not supported, only 'text'"
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"{where}: needs a text")
    return str(part["text"])


def _parse_arguments(tool_calls: Any, where: str) -> None:
    """Make the arguments of earlier tool calls what templates expect: a dict.

    The OpenAI API carries them as a JSON string, which `tojson` would quote a second time.
    """
    if not isinstance(tool_calls, list):
        raise InvalidRequestError(f"{where}: must be a list")
    for n, call in enumerate(tool_calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
            continue
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise InvalidRequestError(
                f"{where}[{n}].function.arguments: not valid JSON: {error}"
            ) from error
        function["arguments"] = arguments


def _alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
