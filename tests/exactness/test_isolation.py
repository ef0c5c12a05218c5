"""One request makes the model raise; the tokens and logprobs of all others keep every bit."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.engine_core import EngineCore
from footplate.backend.request import Request
from footplate.backend.step import ModelRunner, RunnerFacts, StepPlan, StepResult
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest, ErrorKind, FinishReason
from footplate.protocol.token_params import LogitAdjustments, LogprobsRequest, TokenParams

from .architectures import VOCAB_SIZE, make_model
from .driver import KERNEL_BLOCK_SIZE, TORCH_BLOCK_SIZE, Loader

CLIENT = b"client"
NUM_REQUESTS = 8
NUM_NEW_TOKENS = 12


class Raising:
    """A runner whose model raises when the marked request has as many tokens of output as it says,
    after all that the model does for it and its neighbours has been done."""

    def __init__(self, runner: Any) -> None:
        self.facts: RunnerFacts = runner.facts
        self.marked: int | None = None
        self.fails_at = 0
        self.error: type[Exception] = RuntimeError
        self.num_raised = 0
        self._runner = runner
        self._plan = StepPlan()
        if hasattr(runner, "_compute"):  # a forward for each request
            runner._compute = self._after(runner._compute)
        else:
            runner._model.forward = self._after(runner._model.forward)

    def execute(self, plan: StepPlan) -> StepResult:
        self._plan = plan
        result: StepResult = self._runner.execute(plan)
        return result

    def _after(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def compute_and_raise(*args: Any) -> Any:
            done = compute(*args)
            requests = [args[0]] if isinstance(args[0], Request) else self._plan.requests
            if any(map(self._is_due, requests)):
                self.num_raised += 1
                raise self.error("in the middle")
            return done

        return compute_and_raise

    def _is_due(self, request: Request) -> bool:
        return request.handle == self.marked and request.num_output_tokens >= self.fails_at


def random_requests(rng: random.Random) -> list[AddRequest]:
    return [
        AddRequest(
            handle,
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 15, 17, 40]))],
            TokenParams(
                temperature=rng.choice([0.0, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([0, 20]),
                min_p=0.0,
                seed=rng.getrandbits(63),
                max_tokens=NUM_NEW_TOKENS,
                min_tokens=rng.choice([0, 3]),
                stop_token_ids=(),
                adjustments=rng.choice([None, LogitAdjustments(0.5, 0.5, 1.2)]),
                logprobs=LogprobsRequest(5, num_prompt_logprobs=rng.choice([None, 2])),
            ),
        )
        for handle in range(NUM_REQUESTS)
    ]


@dataclass
class Told:
    """All that a client was told of one request."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scores: bytes = b""  # of tokens and prompt, whatever the chunks in which they came
    end: tuple[FinishReason, ErrorKind] | None = None


def run(runner: ModelRunner, requests: list[AddRequest], block_size: int) -> dict[int, Told]:
    core = EngineCore(
        runner,
        CacheConfig(block_size=block_size),
        SchedulerConfig(max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=48),
        epoch=1,
        clock=lambda: 0.0,
    )
    core.join(CLIENT)
    told = {request.handle: Told() for request in requests}
    for request in requests:
        core.handle(CLIENT, request)
    while core.has_work:
        core.step()
        core.check_ledger()
        for _, outputs in core.take_outputs():
            columns = zip(outputs.handles, outputs.positions, outputs.token_ids, strict=True)
            for handle, position, token_id in columns:
                told[handle].positions.append(position)
                told[handle].token_ids.append(token_id)
            for rows in (*outputs.prompt_logprobs, *outputs.logprobs):
                width = len(rows.token_ids) // len(rows.ranks)
                for start in range(0, len(rows.token_ids), width):
                    told[rows.handle].scores += rows.token_ids[start : start + width]
                    told[rows.handle].scores += rows.logprobs[start : start + width]
            for finished in outputs.finished:
                told[finished.handle].end = finished.reason, finished.kind
    return told


def make_subject(load: Loader, folder: Path, architecture: str, block_size: int) -> Raising:
    make_model(architecture).save_pretrained(folder)
    return Raising(load(folder, block_size, dtype="float32"))


@pytest.fixture(scope="module")
def paged(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Raising:
    subject = make_subject(load, tmp_path_factory.mktemp("llama"), "llama", KERNEL_BLOCK_SIZE)
    assert subject.facts.model.attention.startswith("paged cpu")
    return subject


@pytest.fixture(scope="module")
def cached(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Raising:
    """Its convolutions have states that are changed in place."""
    subject = make_subject(load, tmp_path_factory.mktemp("lfm2"), "lfm2", TORCH_BLOCK_SIZE)
    assert subject.facts.model.attention == "per-request cache"
    return subject


def check(subject: Raising, block_size: int, error: type[Exception], seed: int) -> None:
    """A clean run, and one in which a request raises, or finds no memory."""
    rng = random.Random(seed)
    requests = random_requests(rng)
    subject.marked = None
    clean = run(subject, requests, block_size)
    subject.marked, subject.fails_at = rng.randrange(NUM_REQUESTS), rng.choice([0, 0, 1, 5])
    subject.error, subject.num_raised = error, 0
    told = run(subject, requests, block_size)
    kind = ErrorKind.INTERNAL if error is ValueError else ErrorKind.MEMORY
    culprit, whole = told.pop(subject.marked), clean.pop(subject.marked)
    assert culprit.end == (FinishReason.ERROR, kind)
    assert culprit.token_ids == whole.token_ids[: subject.fails_at]
    assert subject.num_raised > 1
    assert told == clean, f"seed {seed}"
    assert all(len(each.token_ids) == NUM_NEW_TOKENS for each in told.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_others_keep_every_bit(paged: Raising, error: type[Exception], seed: int) -> None:
    check(paged, KERNEL_BLOCK_SIZE, error, seed)


@pytest.mark.parametrize("seed", range(4))
def test_others_keep_every_bit_of_caches_of_their_own(cached: Raising, seed: int) -> None:
    check(cached, TORCH_BLOCK_SIZE, ValueError, seed)
