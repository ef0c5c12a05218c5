"""Custom logits processors: code of the operator's, named when the engine starts, that changes the
logits of requests that ask for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from footplate.protocol.errors import EngineStartError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class LogitsProcessor:
    """What a processor is. Subclass it, or write a class with the same methods.

    There is one object per request that asks for the processor, and it runs on the engine's own
    thread: what it takes, every request in the batch waits for.

    What it does must be a function of its arguments, the prompt, and the output so far: no clock,
    no random numbers without a seed, nothing remembered that the output does not say. For the
    object can be replaced at any time by a new one that is shown the whole output at once: when
    its request is preempted, or goes on in another process. Then the same output must follow.

    Whatever it raises ends its own request with an error, and no other. So does a row that it
    leaves with a NaN or +infinity, and a value that it returns.

    Args:
        arguments: what the request says, of JSON's types; the object's own.
        prompt_token_ids: of the request.
        vocab_size: length of a row of logits; ids are 0 to vocab_size - 1.
    """

    def __init__(
        self, arguments: dict[str, Any], prompt_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        self.arguments = arguments
        self.prompt_token_ids = prompt_token_ids
        self.vocab_size = vocab_size

    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> None:
        """Raise ValueError, with words for the user, if a request must not say this. Called before
        the object is made."""

    def __call__(self, output_token_ids: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        """Change the logits of the next token in place.

        It comes after allowed tokens, bad words, min_tokens and logit_bias, and before penalties.
        Impossible tokens have -infinity. A grammar is applied later: it cannot be broken here.

        Args:
            output_token_ids: the output so far.
            logits: float32 [vocab_size]; not to be kept beyond the call.
        """
        raise NotImplementedError


def load_processors(names: Sequence[str]) -> tuple[type[LogitsProcessor], ...]:
    """Import the classes that the engine was started with.

    Args:
        names: "package.module:Class" each. From the operator's configuration, never from a
            message: importing runs code.

    Raises:
        EngineStartError: one of them is no such class; the message names it.
    """
    return tuple(_load(name) for name in names)


def _load(name: str) -> type[LogitsProcessor]:
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise EngineStartError(f"logits processor {name!r}: must be 'package.module:Class'")
    try:
        found: Any = importlib.import_module(module_name)
        for part in class_name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs whatever the module says
        raise EngineStartError(
            f"logits processor {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, type) or "__call__" not in dir(found):
        raise EngineStartError(
            f"logits processor {name!r} is no class with __call__(output_token_ids, logits)"
        )
    return found
