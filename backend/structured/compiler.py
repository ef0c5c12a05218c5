"""Grammars are compiled here, beside the busy loop: one may take two seconds."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from footplate.backend.structured.cache import GrammarCache, estimate_bytes
from footplate.backend.structured.interface import CompiledGrammar, GrammarEngine, GrammarError
from footplate.protocol.grammar_limits import start_deep_thread
from footplate.protocol.token_params import Grammar

logger = logging.getLogger(__name__)

MAX_PENDING = 1024  # different grammars that wait or are being compiled

Outcome = CompiledGrammar | GrammarError


class GrammarCompiler:
    """Owns a thread, which starts with the first grammar, and the cache of what it compiled.

    The same grammar is compiled once, however many requests wait for it. A failure is not
    remembered. Methods are for one thread, that of the busy loop.

    Args:
        engines: makes the engine of a language; called on the thread, when it is first needed.
        wake: called from the thread when something is finished.
    """

    def __init__(
        self,
        engines: Mapping[str, Callable[[], GrammarEngine]],
        wake: Callable[[], None],
        cache: GrammarCache | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._factories = engines
        self._engines: dict[str, GrammarEngine] = {}  # the thread's
        self._wake = wake
        self._cache = GrammarCache() if cache is None else cache
        self._max_pending = max_pending
        self._pending: dict[Grammar, list[int]] = {}
        self._refused: list[tuple[int, Outcome]] = []
        self._to_compile: queue.SimpleQueue[Grammar] = queue.SimpleQueue()
        self._compiled: queue.SimpleQueue[tuple[Grammar, Outcome, float]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, key: int, grammar: Grammar) -> CompiledGrammar | None:
        """See `CompilesGrammars`."""
        if compiled := self._cache.get(grammar):
            return compiled
        if keys := self._pending.get(grammar):
            keys.append(key)
        elif grammar.language not in self._factories:
            self._refuse(key, f"there is no grammar engine for the language {grammar.language!r}")
        elif len(self._pending) >= self._max_pending:
            self._refuse(key, f"{self._max_pending} grammars wait for compilation already")
        else:
            try:
                self._start_thread()
            except RuntimeError as error:  # no memory for its stack
                self._refuse(key, f"the grammar compiler cannot start: {error}")
                return None
            self._pending[grammar] = [key]
            self._to_compile.put(grammar)
        return None

    def _refuse(self, key: int, why: str) -> None:
        self._refused.append((key, GrammarError(why)))

    def _start_thread(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="grammar compiler", daemon=True)
            start_deep_thread(thread)
            self._thread = thread

    def take_finished(self) -> list[tuple[int, Outcome]]:
        """See `CompilesGrammars`."""
        finished, self._refused = self._refused, []
        while not self._compiled.empty():
            grammar, outcome, cpu_s = self._compiled.get()
            if not isinstance(outcome, GrammarError):
                self._cache.put(grammar, outcome, estimate_bytes(grammar, cpu_s))
            finished += [(key, outcome) for key in self._pending.pop(grammar)]
        return finished

    # ---- the thread

    def _run(self) -> None:
        while True:
            grammar = self._to_compile.get()
            since = time.thread_time()
            outcome = self._compile(grammar)
            self._compiled.put((grammar, outcome, time.thread_time() - since))
            self._wake()

    def _compile(self, grammar: Grammar) -> Outcome:
        try:
            engine = self._engines.get(grammar.language)
            if engine is None:
                engine = self._engines[grammar.language] = self._factories[grammar.language]()
            return engine.compile(grammar)
        except GrammarError as error:
            return error
        except BaseException as error:  # a panic in Rust is no Exception, and nobody would answer
            logger.exception("a grammar of %d characters failed", len(grammar.text))
            return GrammarError(f"the grammar engine failed: {type(error).__name__}: {error}"[:300])
