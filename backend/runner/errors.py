"""The one error of loading: what is wrong with the model, or with how it is configured."""

from footplate.protocol.errors import EngineStartError


class ModelLoadError(EngineStartError, ValueError):
    """The model cannot be served as it is configured. The message is one line, and says what to
    change."""


def one_line(error: BaseException, max_chars: int = 300) -> str:
    """The first paragraph of a library's message, on one line: the rest is usually advice for
    users of that library."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
