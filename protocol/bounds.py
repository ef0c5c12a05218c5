"""The bounds on what a request may ask for, and how a value outside of them is refused.

Bounds that a person could argue with are constants with names. Each keeps one request from costing
the others: their memory, their time on the event loop, their step.
"""

import math
import sys
from collections.abc import Collection

from footplate.protocol.errors import InvalidParameterError

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_FLOAT = sys.float_info.max

MAX_N = 16_384
MAX_REQUEST_ID_CHARS = 512  # of a request that outlives its client; others stay in the client
MAX_SESSION_BYTES = 64
MIN_CLIENT_KEY_CHARS = 16  # what can be guessed is no key
MAX_CLIENT_KEY_CHARS = 256
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0  # larger ones are clamped, as in vLLM
MAX_LOGIT_BIAS_ENTRIES = 4096
MAX_ALLOWED_TOKEN_IDS = 262_144  # beyond every vocabulary in use
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MAX_LOGPROB_TOKEN_IDS = 1024
MAX_REPETITION_PATTERN = 1024  # tokens; each pattern size costs a comparison per token
MAX_PROCESSOR_ARGUMENT_BYTES = 65_536
MAX_GRAMMAR_BYTES = 262_144
MAX_SCHEMA_DEPTH = 64


def require_bool(name: str, value: object) -> None:
    """Raise InvalidParameterError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InvalidParameterError(name, value, "True or False")


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise InvalidParameterError unless `value` is an integer from `low` to `high`."""
    # bool is an int to Python; as a count it is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameterError(name, value, f"an integer from {low} to {high}")


def require_number(
    name: str, value: object, low: float, high: float, *, above: bool = False
) -> None:
    """Raise InvalidParameterError unless `value` is a finite number from `low` to `high`.

    Args:
        above: `low` itself is out of bounds.
    """
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    # NaN fails every comparison. Infinity, and integers beyond all floats, fail the last one.
    if bad or not (low <= value <= high) or (above and value == low) or not abs(value) <= MAX_FLOAT:  # type: ignore[operator,arg-type]
        bounds = [] if math.isinf(low) else [f"above {low:g}" if above else f"at least {low:g}"]
        bounds += [] if math.isinf(high) else [f"at most {high:g}"]
        raise InvalidParameterError(name, value, f"a finite number {' and '.join(bounds)}".rstrip())


def require_token_ids(name: str, value: object, most: int) -> None:
    """Raise InvalidParameterError unless `value` is None or a list of at most `most` token ids."""
    if value is None:
        return
    require_list(name, value, most, "ids")
    for token_id in value:  # type: ignore[attr-defined]
        require_int(name, token_id, 0, MAX_INT)


def require_list(name: str, value: object, most: int, of: str) -> None:
    """Raise InvalidParameterError unless `value` is a list or tuple of at most `most` items."""
    if not isinstance(value, list | tuple):
        raise InvalidParameterError(name, value, "a list, or None")
    require_few(name, value, most, of)


def require_few(name: str, value: Collection[object], most: int, of: str) -> None:
    """Raise InvalidParameterError if there are more than `most` items in `value`."""
    if len(value) > most:
        # The value itself may be as large as the mistake.
        raise InvalidParameterError(name, f"<{len(value)} {of}>", f"at most {most} {of}")
