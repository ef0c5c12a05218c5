"""Compiling beside the loop, with engines that do what a test says."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from footplate.backend.structured.cache import GrammarCache
from footplate.backend.structured.compiler import GrammarCompiler
from footplate.backend.structured.interface import CompiledGrammar, GrammarEngine, GrammarError
from footplate.protocol.token_params import Grammar

from .sampling import allowed, demo_engine

PATIENCE_S = 30


class PanicException(BaseException):
    """As a panic in Rust arrives: not an Exception."""


class ScriptedEngine:
    """Compiles a text to itself; texts that begin with an error's name raise it. Waits at `gate`
    where there is one."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.threads: set[int] = set()
        self.gate: threading.Semaphore | None = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        if self.gate:
            assert self.gate.acquire(timeout=PATIENCE_S)
        self.compiled.append(grammar.text)
        self.threads.add(threading.get_ident())
        match grammar.text.split():
            case ["bad", *_]:
                raise GrammarError("it is bad")
            case ["bug", *_]:
                raise ZeroDivisionError("in the engine")
            case ["panic", *_]:
                raise PanicException("index out of bounds")
        return cast(CompiledGrammar, grammar.text)


@dataclass
class Bench:
    """A compiler, and a wait for what it has finished that needs no sleep."""

    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    cache: GrammarCache = field(default_factory=GrammarCache)
    max_pending: int = 1024
    woken: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)
    num_engines: int = 0

    def __post_init__(self) -> None:
        self.compiler = GrammarCompiler(
            {"llguidance": self.make}, lambda: self.woken.put(None), self.cache, self.max_pending
        )

    def make(self) -> GrammarEngine:
        self.num_engines += 1
        return self.engine

    def wait(self, count: int) -> dict[int, str]:
        """The next `count` outcomes, as words."""
        outcomes: list[tuple[int, object]] = list(self.compiler.take_finished())
        while len(outcomes) < count:
            self.woken.get(timeout=PATIENCE_S)
            outcomes += self.compiler.take_finished()
        assert len(outcomes) == count == len(dict(outcomes))
        return {key: str(outcome) for key, outcome in outcomes}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_grammar_is_compiled_in_another_thread_and_handed_out_once(bench: Bench) -> None:
    assert bench.compiler.submit(7, Grammar("a")) is None
    assert bench.wait(1) == {7: "a"}
    assert bench.compiler.take_finished() == []
    assert threading.get_ident() not in bench.engine.threads


def test_no_thread_and_no_engine_before_the_first_grammar(bench: Bench) -> None:
    before = threading.active_count()
    other = Bench()
    assert threading.active_count() == before
    assert other.num_engines == 0
    assert other.compiler.take_finished() == []


def test_a_grammar_that_was_compiled_is_there_at_once(bench: Bench) -> None:
    bench.compiler.submit(1, Grammar("a"))
    bench.wait(1)
    there: object = bench.compiler.submit(2, Grammar("a"))
    assert there == "a"
    assert bench.compiler.take_finished() == []
    assert bench.engine.compiled == ["a"]


def test_one_grammar_of_many_requests_is_compiled_once(bench: Bench) -> None:
    bench.engine.gate = threading.Semaphore(0)
    for key in range(50):
        bench.compiler.submit(key, Grammar("a"))
    bench.engine.gate.release()
    assert bench.wait(50) == dict.fromkeys(range(50), "a")
    assert bench.engine.compiled == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("bad", "it is bad"), ("bug", "ZeroDivisionError"), ("panic", "PanicException")],
)
def test_a_hundred_failures_are_errors_of_their_requests_alone(
    bench: Bench, text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.compiler.submit(-1, Grammar("good"))
    assert bench.wait(1) == {-1: "good"}
    for number in range(100):
        bench.compiler.submit(number, Grammar(f"{text} {number}"))
        assert words in bench.wait(1)[number]
    bench.compiler.submit(-2, Grammar("good too"))
    assert bench.wait(1) == {-2: "good too"}
    assert len(bench.engine.threads) == 1
    assert len(bench.cache) == 2


def test_a_failure_is_tried_again_with_the_next_request(bench: Bench) -> None:
    for key in (1, 2):
        bench.compiler.submit(key, Grammar("bad"))
        assert bench.wait(1) == {key: "it is bad"}
    assert bench.engine.compiled == ["bad", "bad"]


def test_a_language_without_an_engine_is_an_error(bench: Bench) -> None:
    assert bench.compiler.submit(1, Grammar("a", "esperanto")) is None
    assert "'esperanto'" in bench.wait(1)[1]


def test_an_engine_that_cannot_be_made_is_an_error_of_each_request() -> None:
    bench = Bench()

    def fail() -> GrammarEngine:
        raise ModuleNotFoundError("No module named 'llguidance'")

    bench.compiler = GrammarCompiler({"llguidance": fail}, lambda: bench.woken.put(None))
    for key in (1, 2):
        bench.compiler.submit(key, Grammar("a"))
        assert "llguidance" in bench.wait(1)[key]


def test_grammars_beyond_the_bound_on_waiting_ones_are_refused_and_others_are_not() -> None:
    bench = Bench(max_pending=3)
    bench.engine.gate = threading.Semaphore(0)
    for key in range(4):
        bench.compiler.submit(key, Grammar(f"g{key}"))
    bench.compiler.submit(9, Grammar("g0"))  # no new one
    assert "3 grammars wait" in bench.wait(1)[3]
    bench.engine.gate.release(3)
    assert bench.wait(4) == {0: "g0", 1: "g1", 2: "g2", 9: "g0"}
    bench.engine.gate.release()
    bench.compiler.submit(4, Grammar("g4"))
    assert bench.wait(1) == {4: "g4"}


def test_a_thread_that_cannot_start_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("footplate.backend.structured.compiler.start_deep_thread", refuse)
        bench.compiler.submit(1, Grammar("a"))
        assert "can't start new thread" in bench.wait(1)[1]
    bench.compiler.submit(2, Grammar("a"))
    assert bench.wait(1) == {2: "a"}


def test_the_real_engine_compiles_in_this_thread_too() -> None:
    woken: queue.SimpleQueue[None] = queue.SimpleQueue()
    wake: Callable[[], None] = lambda: woken.put(None)  # noqa: E731
    compiler = GrammarCompiler({"llguidance": demo_engine}, wake)
    compiler.submit(1, Grammar('start: "a"'))
    compiler.submit(2, Grammar("start: nowhere"))
    outcomes = dict[int, CompiledGrammar | GrammarError]()
    while len(outcomes) < 2:
        woken.get(timeout=PATIENCE_S)
        outcomes |= compiler.take_finished()
    assert isinstance(outcomes[2], GrammarError)
    compiled = outcomes[1]
    assert not isinstance(compiled, GrammarError)
    assert allowed(compiled.start()).size == 1
