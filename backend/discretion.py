"""What of an error text is for people who are not on this machine."""

import re

# In this order. No pattern looks at a character more than a hundred times, whatever the text.
_PLACES = (
    (re.compile(r"<[^<>]{1,100} at 0x[0-9a-fA-F]+>"), "<object>"),
    (re.compile(r"\b0x[0-9a-fA-F]+"), "<address>"),
    (re.compile(r"\b(?:ipc|tcp|inproc|file)://[^\s'\",;)]+"), "<address>"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "<address>"),
    # One that stands by itself, or in quotes: "1/2" and "and/or" are none.
    (re.compile(r"(?<![\w.)\]/])(?:~|\.{1,2})?/[^\s'\":,;()]+"), "<path>"),
    (re.compile(r"\b(pid|process)([ =:])\d+\b", re.IGNORECASE), r"\1\2<id>"),
)


def without_places(text: str) -> str:
    """The text without paths, addresses, and ids of processes: they are of no use to somebody
    who is elsewhere, unless as a step of an attack."""
    for pattern, substitute in _PLACES:
        text = pattern.sub(substitute, text)
    return text
