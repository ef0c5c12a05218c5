"""Special tokens that users type: kept apart from those a chat template writes.

Once a prompt is one string, `<|im_end|>` in a user's message looks exactly like the template's
own. So it is marked before the template runs, and encoded as plain characters afterwards
(the idea, and for well-formed input the result, is transformers' `sanitize_control_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# Noncharacters, "permanently reserved for internal use" (Unicode 23.7).
_START, _END = "\ufdd0", "\ufdd1"
_MARKS = str.maketrans("", "", _START + _END)
_TEXT_KEYS = ("text", "content")


class LiteralText:
    """Marks a set of tokens in user text, and finds the marks again in rendered text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Longest first: a token takes priority over the tokens it contains.
        any_token = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        self._token = re.compile(any_token)
        self._marked = re.compile(f"{_START}({any_token}){_END}|[{_START}{_END}]")

    def occurs_in(self, value: Any) -> bool:
        """Whether any text in plain data holds a token, or texts in a row would form one."""
        if isinstance(value, str):
            return self._token.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.occurs_in, value.values()))
        if isinstance(value, list):
            return any(map(self.occurs_in, value)) or self._forms_across(_texts_in_a_row(value))
        return False

    def mark(self, value: Any) -> Any:
        """Return a copy of plain data with every token marked; keys of dicts are left alone.

        Marks the user may have typed are dropped first, so none can be forged.
        """
        if isinstance(value, str):
            return self._token.sub(rf"{_START}\g<0>{_END}", value.translate(_MARKS))
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return self._keep_apart([self.mark(item) for item in value])
        return value

    def unmark(self, text: str) -> str:
        """Return the text without any marks."""
        return text.translate(_MARKS)

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cut marked text into non-empty pieces; True means: encode this one as characters.

        A template may have torn a pair of marks apart. Such a mark is dropped, but the text
        stays cut there, so that its two sides cannot form a token after all.
        """
        # Splitting gives text, token, text, token, ..., text; None where a mark stood alone.
        for n, piece in enumerate(self._marked.split(text)):
            if piece:
                yield piece, n % 2 == 1

    def _keep_apart(self, items: list[Any]) -> list[Any]:
        """Cut between texts in a row if a template that joins them would write a token."""
        texts = [text.translate(_MARKS) for text in _texts_in_a_row(items)]
        if not self._forms_across(texts):
            return items
        return [_cut_behind(item) for item in items]

    def _forms_across(self, texts: list[str]) -> bool:
        if len(texts) < 2:
            return False
        num_inside = sum(len(self._token.findall(text)) for text in texts)
        return len(self._token.findall("".join(texts))) != num_inside


def _texts_in_a_row(items: list[Any]) -> list[str]:
    """The texts of a list that a template may well join: strings, parts, or messages."""
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            texts += [item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)]
    return texts


def _cut_behind(item: Any) -> Any:
    if isinstance(item, str):
        # In front of white space at the end, which a template may want to trim.
        end = len(item.rstrip())
        return item[:end] + _END + item[end:]
    if isinstance(item, dict):
        return {
            key: _cut_behind(value) if key in _TEXT_KEYS and isinstance(value, str) else value
            for key, value in item.items()
        }
    return item
