"""Requests with grammars through a real scheduler, runner, compiler and grammar engine: a small
random model over the demo model's vocabulary, so that tokens are pieces of text."""

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.step import ModelRunner, RunnerFacts, StepPlan, StepResult
from footplate.backend.structured.compiler import GrammarCompiler
from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.structured import GrammarTranslator
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest, FinishReason, GetStats, Stats
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import Grammar

from .sampling import VOCAB_SIZE, demo_engine

CLIENT = b"client"
BLOCK_SIZE = 16  # a page of our kernels
PATIENCE_S = 30.0
TRANSLATOR = GrammarTranslator()

Row = tuple[int, bytes, bytes]  # rank, ids, scores


def grammar_of(**kind: Any) -> Grammar:
    """As `StructuredOutputsParams` has it."""
    return TRANSLATOR.translate(StructuredOutputsParams(**kind))


@cache
def engine_of(eos_token_ids: tuple[int, ...]) -> LlguidanceEngine:
    """The grammar engine of a model with these end-of-sequence tokens."""
    return demo_engine(eos_token_ids)


def make_model(eos_token_ids: tuple[int, ...]) -> Any:
    """A float32 model with weights at a scale at which a wrong key changes what comes next."""
    torch.set_num_threads(1)  # two on matrices of this size only wait for each other
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=list(eos_token_ids) or None,
    )
    factory: Any = LlamaForCausalLM
    model = factory(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, 1)
            elif weight.ndim == 2:
                weight.normal_(0, 2.5 * weight.shape[1] ** -0.5)
    return model


def save(model: Any, folder: Path) -> None:
    """The model and its tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)


def load(model: Any, folder: Path) -> ModelRunner:
    """The model as the engine core has it, with our kernels."""
    save(model, folder)
    runner = load_model_runner(
        ModelConfig(model=str(folder), num_threads=1, device="cpu", dtype="float32"),
        CacheConfig(block_size=BLOCK_SIZE, num_gpu_blocks_override=400),
        SchedulerConfig(),
        lambda phase, fraction: None,
    )
    assert runner.facts.model.attention.startswith("paged cpu")
    return runner


class Crowded:
    """A runner that claims to have fewer blocks, so that requests are preempted."""

    def __init__(self, runner: ModelRunner, num_blocks: int) -> None:
        self._runner = runner
        model = msgspec.structs.replace(runner.facts.model, max_model_len=num_blocks * BLOCK_SIZE)
        self.facts: RunnerFacts = replace(runner.facts, num_kv_blocks=num_blocks, model=model)
        self.num_mixed_steps = 0  # with chunks of prompts beside decodes

    def execute(self, plan: StepPlan) -> StepResult:
        """As the runner does."""
        self.num_mixed_steps += len({count == 1 for count in plan.num_new_tokens}) == 2
        return self._runner.execute(plan)


@dataclass
class Answer:
    """What came of one request.

    Attributes:
        rows: of the logprobs of its tokens, in order.
    """

    token_ids: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    reason: FinishReason | None = None
    message: str = ""


class StructuredDriver:
    """An engine core with a real grammar compiler and one client."""

    def __init__(
        self,
        runner: ModelRunner | Crowded,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
    ) -> None:
        facts = runner.facts.model
        self._compiled = threading.Event()
        compiler = GrammarCompiler(
            {"llguidance": lambda: engine_of(facts.eos_token_ids)}, self._compiled.set
        )
        self._core = EngineCore(
            runner,
            CacheConfig(block_size=BLOCK_SIZE),
            SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
            ),
            epoch=1,
            clock=lambda: 0.0,
            grammars=compiler,
        )
        self._core.join(CLIENT)

    def run(
        self,
        requests: Sequence[AddRequest],
        between_steps: Callable[[], Sequence[AddRequest]] = lambda: (),
    ) -> dict[int, Answer]:
        """Add requests, and those that come between the steps, and serve all of them to their
        ends; the answers by handle."""
        answers: dict[int, Answer] = {}
        self._add(requests, answers)
        while any(answer.reason is None for answer in answers.values()):
            self._add(between_steps(), answers)
            self._core.step()
            self._take_outputs(answers)
            if not self._core.has_work and any(a.reason is None for a in answers.values()):
                assert self._compiled.wait(PATIENCE_S), "a grammar is never compiled"
                self._compiled.clear()
        self._core.check_ledger()
        return answers

    def _add(self, requests: Sequence[AddRequest], answers: dict[int, Answer]) -> None:
        for request in requests:
            for handle in range(request.handle, request.handle + request.n):
                answers[handle] = Answer()
            self._core.handle(CLIENT, request)

    def _take_outputs(self, answers: dict[int, Answer]) -> None:
        for _, outputs in self._core.take_outputs():
            for handle, token_id in zip(outputs.handles, outputs.token_ids, strict=True):
                answers[handle].token_ids.append(token_id)
            for scored in outputs.logprobs:
                answers[scored.handle].rows.append(
                    (scored.ranks[0], scored.token_ids, scored.logprobs)
                )
            for finished in outputs.finished:
                answers[finished.handle].reason = finished.reason
                answers[finished.handle].message = finished.message

    @property
    def stats(self) -> Stats:
        """The core's books."""
        reply = self._core.handle(CLIENT, GetStats(0))
        assert reply is not None and reply.stats is not None
        return reply.stats
