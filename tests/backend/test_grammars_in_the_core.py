"""Requests whose grammar is being compiled: live, abortable, counted, and nobody's obstacle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.step import StepPlan, StepResult
from footplate.backend.structured.interface import CompiledGrammar, GrammarError
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Stats,
)
from footplate.protocol.token_params import Grammar, TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 2, 0, ())
ALICE = b"alice"


class Anything(str):
    """A compiled grammar, by its text, that allows everything."""

    def start(self) -> "Anything":
        return self

    def advance(self, token_ids: Sequence[int]) -> bool:
        if self == "raises":
            raise RuntimeError("a bug")
        return self == "complete"

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        mask[:] = -1


class ScriptedCompiler:
    """Compiles when a test says so; a text that is in `there` is compiled already."""

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.submitted: dict[int, str] = {}
        self._finished: list[tuple[int, CompiledGrammar | GrammarError]] = []

    def submit(self, key: int, grammar: Grammar) -> CompiledGrammar | None:
        if grammar.text in self.there:
            return Anything(grammar.text)
        self.submitted[key] = grammar.text
        return None

    def finish(self, text: str, error: str = "") -> None:
        for key in [key for key, grammar in self.submitted.items() if grammar == text]:
            del self.submitted[key]
            outcome = GrammarError(error) if error else Anything(text)
            self._finished.append((key, outcome))

    def take_finished(self) -> list[tuple[int, CompiledGrammar | GrammarError]]:
        finished, self._finished = self._finished, []
        return finished


class RecordingRunner(FakeModelRunner):
    """Notes which grammar each handle had when it ran."""

    def execute(self, plan: StepPlan) -> StepResult:
        self.ran: dict[int, object] = {request.handle: request.grammar for request in plan.requests}
        return super().execute(plan)


class Driver:
    def __init__(self, folder: Path, compiler: ScriptedCompiler | None) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
        cache = CacheConfig(block_size=4, num_gpu_blocks_override=32)
        model = ModelConfig(model="fake", max_model_len=40)
        self.runner = RecordingRunner(model, cache, folder)
        self.core = EngineCore(
            self.runner, cache, SchedulerConfig(), 7, lambda: 0.0, grammars=compiler
        )
        self.core.join(ALICE)
        self.ends: dict[int, Finished] = {}

    def add(self, handle: int, text: str | None, max_tokens: int = 2, **options: Any) -> None:
        grammar = None if text is None else Grammar(text)
        params = msgspec.structs.replace(PARAMS, grammar=grammar, max_tokens=max_tokens)
        self.core.handle(ALICE, AddRequest(handle, [1, 2, handle], params, **options))

    def step(self) -> set[int]:
        """Handles that ran."""
        self.runner.ran = {}
        self.core.step()
        self.core.check_ledger()
        for _, outputs in self.core.take_outputs():
            self.ends |= {finished.handle: finished for finished in outputs.finished}
        return set(self.runner.ran)

    def stats(self) -> Stats:
        reply = self.core.handle(ALICE, GetStats(1))
        assert reply is not None and reply.stats is not None
        return reply.stats


@pytest.fixture
def compiler() -> ScriptedCompiler:
    return ScriptedCompiler()


@pytest.fixture
def driver(tmp_path: Path, compiler: ScriptedCompiler) -> Driver:
    return Driver(tmp_path, compiler)


def test_a_request_runs_when_its_grammar_is_compiled_and_others_before(
    driver: Driver, compiler: ScriptedCompiler
) -> None:
    driver.add(1, "g")
    driver.add(2, None)
    assert driver.step() == {2}
    assert driver.stats().num_waiting == 1
    compiler.finish("g")
    assert driver.step() == {1, 2}
    assert driver.runner.ran == {1: "g", 2: None}
    driver.step()
    assert driver.ends == {h: Finished(h, FinishReason.LENGTH) for h in (1, 2)}


def test_a_grammar_that_is_there_costs_no_step(driver: Driver, compiler: ScriptedCompiler) -> None:
    compiler.there.add("g")
    driver.add(1, "g")
    assert driver.step() == {1}


def test_a_core_that_only_compiles_has_no_work(driver: Driver, compiler: ScriptedCompiler) -> None:
    driver.add(1, "g")
    assert not driver.core.has_work
    driver.step()
    assert not driver.core.has_work
    compiler.finish("g")
    driver.step()
    assert driver.core.has_work


def test_a_grammar_that_fails_ends_its_request_alone(
    driver: Driver, compiler: ScriptedCompiler
) -> None:
    for handle, text in ((1, "good"), (2, "bad"), (3, "good")):
        driver.add(handle, text)
    compiler.finish("bad", "no such rule")
    driver.step()
    assert driver.ends == {2: Finished(2, FinishReason.ERROR, "no such rule", ErrorKind.GRAMMAR)}
    compiler.finish("good")
    assert driver.step() == {1, 3}


def test_a_handle_is_free_again_after_its_grammar_failed(
    driver: Driver, compiler: ScriptedCompiler
) -> None:
    for _ in range(100):
        driver.add(1, "bad")
        compiler.finish("bad", "no such rule")
        driver.step()
        assert driver.ends.pop(1).kind is ErrorKind.GRAMMAR
    driver.add(1, None)
    assert driver.step() == {1}


def test_a_request_can_be_aborted_while_its_grammar_compiles(
    driver: Driver, compiler: ScriptedCompiler
) -> None:
    driver.add(1, "g")
    driver.core.handle(ALICE, AbortRequests([1]))
    driver.step()
    assert driver.ends == {1: Finished(1, FinishReason.ABORT)}
    assert driver.stats().num_waiting == 0
    compiler.finish("g")
    assert driver.step() == set()
    assert len(driver.ends) == 1


@pytest.mark.parametrize("error", ["", "no such rule"])
def test_a_client_can_leave_while_its_grammars_compile(
    driver: Driver, compiler: ScriptedCompiler, error: str
) -> None:
    driver.add(1, "g")
    driver.core.leave(ALICE)
    compiler.finish("g", error)
    assert driver.step() == set()
    driver.core.join(ALICE)
    driver.add(1, None)
    assert driver.step() == {1}


def test_a_core_without_a_compiler_refuses_grammars_and_lives_on(tmp_path: Path) -> None:
    driver = Driver(tmp_path, None)
    driver.add(1, "g")
    driver.add(2, None)
    assert driver.step() == {2}
    assert driver.ends[1].kind is ErrorKind.GRAMMAR


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    ("text", "prior", "reason"),
    [
        ("complete", [5, 6], FinishReason.STOP),
        ("open", [5, 6], FinishReason.LENGTH),
        ("raises", [5, 6], FinishReason.LENGTH),
        ("open", [5, 6, 7] * 12 + [5], FinishReason.LENGTH),  # the context window is full
    ],
)
def test_the_end_of_a_grammar_comes_first_when_a_replay_is_told_how_it_had_ended(
    driver: Driver,
    compiler: ScriptedCompiler,
    text: str,
    prior: list[int],
    reason: FinishReason,
    is_there: bool,
) -> None:
    if is_there:
        compiler.there.add(text)
    driver.add(1, text, max_tokens=len(prior), prior_token_ids=prior, is_replay=True)
    driver.step()
    compiler.finish(text)
    assert driver.step() == set()
    assert driver.ends == {1: Finished(1, reason)}
    assert driver.stats().num_waiting == 0
    driver.add(1, None)
    assert driver.step() == {1}, "its handle is free"


def test_a_replay_whose_grammar_fails_has_that_end(
    driver: Driver, compiler: ScriptedCompiler
) -> None:
    driver.add(1, "bad", prior_token_ids=[5, 6], is_replay=True)
    compiler.finish("bad", "no such rule")
    driver.step()
    assert driver.ends[1].kind is ErrorKind.GRAMMAR
