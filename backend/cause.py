"""What an error is called before people who must not learn where this process keeps its things."""

from footplate.backend.discretion import without_places
from footplate.backend.termination import Terminated

MAX_CHARS = 300


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
    text = " ".join(without_places(text).split())
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS - 3]}..."
    return f"{kind}: {text}" if text else kind
