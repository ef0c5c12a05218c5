"""Logprobs of prompts, from a real model and by every way through a runner, against transformers
and float64."""

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from footplate.backend.request import Request
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.runner.per_request_runner import CachedModel, PerRequestRunner
from footplate.backend.runner.sampler import Sampler
from footplate.backend.step import ModelRunner, ScoredRows, StepPlan
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.token_params import LogprobsRequest, TokenParams

GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 8, 0, ())
PROMPT = [7, 3, 60, 12, 12, 5, 33, 2, 9, 41, 0, 17]


@pytest.fixture(params=["paged torch", "paged cpu", "per-request cache"])
def runner(save_llama: Callable[..., Path], request: pytest.FixtureRequest) -> ModelRunner:
    folder, block_size = save_llama(), 4 if request.param == "paged torch" else 16
    paged = load_model_runner(
        ModelConfig(model=str(folder), num_threads=1, device="cpu"),
        CacheConfig(block_size=block_size),
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        lambda phase, fraction: None,
    )
    if request.param.startswith("paged"):
        assert paged.facts.model.attention.startswith(request.param)
        return paged
    from transformers import AutoModelForCausalLM

    cached = CachedModel(AutoModelForCausalLM.from_pretrained(folder))
    return PerRequestRunner(cached, paged.facts, Sampler(), prefill_in_chunks=True)


@pytest.fixture
def expected(save_llama: Callable[..., Path]) -> torch.Tensor:
    """[len(PROMPT), vocab]: logprobs of what comes behind each token."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(save_llama()).double()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], -1)


def make_request(key: int = 1, **fields: Any) -> Request:
    params = msgspec.structs.replace(GREEDY, logprobs=LogprobsRequest(**fields))
    block_ids = [4 * key, 4 * key + 1, 4 * key + 2]
    return Request(key, b"", key, list(PROMPT), len(PROMPT), params, block_ids=block_ids)


def check(scored: ScoredRows, expected: torch.Tensor, width: int) -> None:
    ids = torch.tensor(array("i", scored.token_ids)).view(-1, width)
    logprobs = torch.tensor(array("f", scored.logprobs)).view(-1, width)
    for row, (own, scores, rank) in enumerate(zip(ids, logprobs, scored.ranks, strict=True)):
        position = scored.position + row
        truth = expected[position - 1]
        assert own[0] == PROMPT[position]
        assert own[1:].tolist() == truth.topk(width - 1).indices.tolist()
        assert rank == 1 + int((truth > truth[own[0]]).sum())
        torch.testing.assert_close(scores.double(), truth[own], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[12], [1, 11], [5, 4, 3], [11, 1]])
def test_every_prompt_token_has_the_models_logprobs(
    runner: ModelRunner, expected: torch.Tensor, lengths: list[int]
) -> None:
    one = make_request(num_prompt_logprobs=3)
    positions: list[int] = []
    for length in lengths:
        is_last = one.num_computed_tokens + length == len(PROMPT)
        result = runner.execute(StepPlan([one], [length], [0] * is_last))
        one.num_computed_tokens += length
        if scored := result.prompt_logprobs.get(0):
            check(scored, expected, 4)
            positions += range(scored.position, scored.position + len(scored.ranks))
    assert positions == list(range(1, len(PROMPT)))
    assert result.token_ids == [int(expected[-1].argmax())]


def test_rows_of_prompts_and_of_samples_are_told_apart(
    runner: ModelRunner, expected: torch.Tensor
) -> None:
    scored = make_request(1, num_prompt_logprobs=0, num_logprobs=2)
    chunk = make_request(2, num_prompt_logprobs=1, prompt_start=3)
    plain = make_request(3)
    plain.params = GREEDY
    result = runner.execute(StepPlan([chunk, scored, plain], [6, 12, 12], [1, 2]))
    assert result.prompt_logprobs.keys() == {0, 1}
    assert result.prompt_logprobs[0].position == 3
    check(result.prompt_logprobs[0], expected, 2)
    check(result.prompt_logprobs[1], expected, 1)
    assert len(result.prompt_logprobs[0].ranks) == 4
    assert result.token_ids == [int(expected[-1].argmax())] * 2
    assert result.logprobs.keys() == {0}
    assert result.logprobs[0].ranks == [1]


def test_a_runner_says_how_many_rows_it_scores_in_a_step(runner: ModelRunner) -> None:
    assert runner.facts.max_scored_rows == 64 * 2**20 // (4 * 61)
