"""What an error is called before people who must not learn where this process keeps its things."""

import re

from footplate.backend.termination import Terminated

MAX_CHARS = 300

# In this order: an object's repr holds an address, a URL may hold a path.
_HIDDEN = (
    (re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>"), "<object>"),
    (re.compile(r"\b[a-z][a-z0-9+]*://[^\s'\",;)]+"), "<address>"),
    (re.compile(r"\b0x[0-9a-fA-F]{4,}\b"), "<address>"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), "<address>"),
    # One that stands by itself, or in quotes: "1/2" and "and/or" are none.
    (re.compile(r"(?<![\w.)\]])(?:~|\.{1,2})?/[\w.+@~-][^\s'\",:;)\]]*"), "<path>"),
    (re.compile(r"\b(pid|process)(\s*[=:]?\s*)\d+", re.IGNORECASE), r"\1\2<number>"),
)


def describe_cause(error: BaseException) -> str:
    """One line of bounded length, without paths, addresses or reprs of objects.

    The error may be foreign code's, so that asking for its words may fail too.
    """
    kind = type(error).__name__
    try:
        text = str(error)
    except Terminated:
        raise
    except BaseException:  # sys.exit() in somebody's __str__ would end everybody's request
        return kind
    for pattern, name in _HIDDEN:
        text = pattern.sub(name, text)
    text = " ".join(text.split())
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS - 3]}..."
    return f"{kind}: {text}" if text else kind
