"""What a grammar engine is to the core: three methods, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from footplate.protocol.token_params import Grammar


class GrammarError(Exception):
    """A grammar does not compile, is too large, or has come to an end that it does not allow."""


class Matcher(Protocol):
    """Where one request's output stands in its grammar. Used by one thread at a time."""

    def advance(self, token_ids: Sequence[int]) -> bool:
        """Take the next tokens of the output; whether the grammar allows nothing more behind them.

        Raises:
            GrammarError: the grammar does not allow one of them, or its limits are exceeded.
        """
        ...

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next: bit i % 32 of word i // 32 is token i. Releases the
        GIL.

        Args:
            mask: int32 [(vocab_size + 31) // 32], contiguous.

        Raises:
            GrammarError: its limits are exceeded.
        """
        ...


class CompiledGrammar(Protocol):
    """A grammar, ready for any number of requests."""

    def start(self) -> Matcher:
        """A matcher at the beginning of an output."""
        ...


class GrammarEngine(Protocol):
    """Compiles grammars for one vocabulary."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes time: not for the busy loop. May be called by several threads.

        Raises:
            GrammarError: with words for the user.
        """
        ...


class CompilesGrammars(Protocol):
    """Grammars on their way from a request to its matcher; what the engine core sees of it."""

    def submit(self, key: int, grammar: Grammar) -> CompiledGrammar | None:
        """Have a grammar compiled for the request of this key. What is there already is returned
        at once; all else, failures too, comes out of `take_finished`."""
        ...

    def take_finished(self) -> list[tuple[int, CompiledGrammar | GrammarError]]:
        """What has been compiled since the call before; each key is handed out once."""
        ...
