"""Beam search finds what transformers' finds: the same tokens, in the same order, with the same
scores."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.utils import logging

from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.beam_request import RequestScorer, run_beam_search
from footplate.frontend.beam_search import BeamSearch, NextTokens
from footplate.protocol.messages import ModelFacts
from footplate.protocol.token_params import TokenParams

from .architectures import VOCAB_SIZE, make_model
from .beam_reference import ModelScorer, TableModel, find, reference


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """One beam has no use for length_penalty, it says."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    yield
    logging.set_verbosity_warning()  # type: ignore[no-untyped-call]


def random_search(seed: int) -> tuple[TableModel, list[int], BeamSearchParams, list[int]]:
    draw = random.Random(seed)
    vocab_size = draw.choice([40, 211])
    num_eos = draw.choice([0, 1, 1, 2, 3])
    model = TableModel(vocab_size, seed, num_eos, eos_bias=draw.choice([-1, 1, 2, 4, 8]))
    params = BeamSearchParams(
        beam_width=draw.choice([1, 2, 3, 4, 5, 8]),
        max_tokens=draw.choice([1, 2, 5, 12, 30]),
        length_penalty=draw.choice([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
        early_stopping=draw.choice([False, True, "never"]),
        ignore_eos=draw.random() < 0.1,
    )
    prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(1, 6))]
    return model, prompt, params, list(range(num_eos))


@pytest.mark.parametrize(
    "first_seed",
    [0, 50, *(pytest.param(s, marks=pytest.mark.thorough) for s in range(100, 300, 50))],
)
def test_random_searches_give_transformers_tokens_order_and_scores_to_the_bit(
    first_seed: int,
) -> None:
    for seed in range(first_seed, first_seed + 50):
        model, prompt, params, eos_token_ids = random_search(seed)
        outputs = find(model, prompt, params, eos_token_ids)
        expected = reference(model, prompt, params, eos_token_ids)
        assert [output.token_ids for output in outputs] == [ids for ids, _ in expected], seed
        if params.beam_width > 1:  # greedy search has no scores in transformers
            assert [output.score for output in outputs] == [score for _, score in expected], seed


def test_random_searches_are_of_all_kinds() -> None:
    """Otherwise the test above would show less than it says."""
    kinds = set()
    for seed in range(100):
        model, prompt, params, eos_token_ids = random_search(seed)
        outputs = find(model, prompt, params, eos_token_ids)
        lengths = {len(output.token_ids) for output in outputs}
        kinds.add((str(params.early_stopping), max(lengths) < params.max_tokens, len(lengths) > 1))
    # Outputs of one length that is not the longest would be a rare accident.
    for early_stopping in ("False", "True", "never"):
        assert {(early_stopping, False, False), (early_stopping, False, True)} <= kinds
        assert (early_stopping, True, True) in kinds


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize(
    "options",
    [
        {"beam_width": 4},
        {"beam_width": 3, "early_stopping": True, "length_penalty": 0.0},
        {"beam_width": 5, "early_stopping": "never", "length_penalty": -0.5},
    ],
    ids=str,
)
def test_searches_on_real_architectures_are_those_of_transformers(
    architecture: str, options: dict[str, Any]
) -> None:
    model = make_model(architecture)
    params = BeamSearchParams(max_tokens=16, **options)
    generator = torch.Generator().manual_seed(2)
    num_ended = 0
    for length in (1, 9, 30):
        prompt = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        # So that some outputs end early, whatever the model prefers.
        eos_token_ids = {ids[4] for ids, _ in reference(model, prompt, params, [])}
        expected = reference(model, prompt, params, sorted(eos_token_ids))
        outputs = find(model, prompt, params, sorted(eos_token_ids))
        assert [output.token_ids for output in outputs] == [ids for ids, _ in expected]
        scores = [score for _, score in expected]
        assert [output.score for output in outputs] == pytest.approx(scores, rel=1e-5)
        num_ended += sum(output.has_eos for output in outputs)
    assert num_ended


async def test_a_search_by_requests_is_that_of_transformers() -> None:
    model = make_model("llama")
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    prompt = [5, 6, 7]
    scorer = ModelScorer(model, prompt)

    async def score_beam(prior_token_ids: list[int], request: TokenParams) -> NextTokens:
        assert request.max_tokens == len(prior_token_ids) + 1
        assert request.logprobs is not None
        assert request.logprobs.num_logprobs is not None
        return scorer.score([prior_token_ids], request.logprobs.num_logprobs)[0]

    facts = ModelFacts("m", "m", "llama", VOCAB_SIZE, 128, (1, 2), "float32", "cpu", "torch")
    search = BeamSearch.of(params, facts.eos_token_ids)
    outputs = await run_beam_search(search, RequestScorer(score_beam, params, facts))
    expected = reference(model, prompt, params, facts.eos_token_ids)
    assert [output.token_ids for output in outputs] == [ids for ids, _ in expected]
