"""Compiled grammars that will be asked for again: least recently used go first."""

from collections import OrderedDict

from footplate.backend.structured.interface import CompiledGrammar
from footplate.protocol.token_params import Grammar

MAX_GRAMMARS = 1024
MAX_BYTES = 256 * 1024 * 1024


class GrammarCache:
    """Owns grammars for as long as there is room. Bounded in number and in bytes.

    Used by one thread.
    """

    def __init__(self, max_grammars: int = MAX_GRAMMARS, max_bytes: int = MAX_BYTES) -> None:
        self._max_grammars = max_grammars
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Grammar, tuple[CompiledGrammar, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grammar: Grammar) -> CompiledGrammar | None:
        """A grammar that has been put in and not been crowded out."""
        entry = self._entries.get(grammar)
        if entry is None:
            return None
        self._entries.move_to_end(grammar)
        return entry[0]

    def put(self, grammar: Grammar, compiled: CompiledGrammar, num_bytes: int) -> None:
        """Keep a grammar that takes `num_bytes`. One larger than the cache is not kept."""
        self._forget(grammar)
        if num_bytes > self._max_bytes:
            return
        self._entries[grammar] = (compiled, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes or len(self._entries) > self._max_grammars:
            self._forget(next(iter(self._entries)))

    def _forget(self, grammar: Grammar) -> None:
        if entry := self._entries.pop(grammar, None):
            self.num_bytes -= entry[1]


def estimate_bytes(grammar: Grammar, cpu_s: float) -> int:
    """What a compiled grammar takes, at most: llguidance does not tell.

    Measured: 65 KiB for the smallest; up to 280 bytes for a byte of text. Grammars whose automaton
    is large and text small (`multipleOf`, repetition) took up to 100 KB for each millisecond of
    compiling.
    """
    return 65_536 + 300 * len(grammar.text) + int(cpu_s * 100e6)
