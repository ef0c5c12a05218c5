"""Three hundred random schemas on random weights: every output that ends by itself is valid."""

import json
import random

import jsonschema
import pytest

from footplate.backend.step import ModelRunner
from footplate.protocol.messages import AddRequest, FinishReason
from footplate.protocol.token_params import LogitAdjustments, TokenParams

from .random_schemas import random_schema
from .sampling import EOS, TOKENIZER, TOKENS, VOCAB_SIZE
from .whole_engine import Crowded, StructuredDriver, grammar_of, load, make_model

NUM_SCHEMAS = 300
MAX_TOKENS = 400
# Random weights have no wish to end: what brings a JSON text nearer to its end is made likelier.
HASTE = {i: 6.0 for i, token in enumerate(TOKENS) if token[:1] in ('"', "}", "]", ",", ":")}
HASTE[EOS] = 20.0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return load(make_model((EOS,)), tmp_path_factory.mktemp("llama"))


def request_of(seed: int) -> AddRequest:
    rng = random.Random(seed)
    params = TokenParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 50]),
        min_p=0.0,
        seed=seed,
        max_tokens=MAX_TOKENS,
        min_tokens=0,
        stop_token_ids=(EOS,),
        adjustments=LogitAdjustments(logit_bias=HASTE, frequency_penalty=rng.choice([0.0, 0.3])),
        grammar=grammar_of(json=random_schema(seed)),
    )
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 5, 30, 60]))]
    return AddRequest(seed, prompt, params)


def test_every_output_that_ends_is_valid(runner: ModelRunner) -> None:
    """In batches whose prompts come in chunks, and where requests are preempted."""
    crowded = Crowded(runner, num_blocks=60)
    driver = StructuredDriver(crowded, max_num_seqs=32, max_num_batched_tokens=40)
    answers = driver.run([request_of(seed) for seed in range(NUM_SCHEMAS)])
    assert len(answers) == NUM_SCHEMAS
    num_complete = 0
    for seed, answer in answers.items():
        assert answer.reason in (FinishReason.STOP, FinishReason.LENGTH), (seed, answer.message)
        if answer.reason is FinishReason.STOP:
            num_complete += 1
            text = TOKENIZER.decode([i for i in answer.token_ids if i != EOS])
            try:
                jsonschema.validate(json.loads(text), random_schema(seed))
            except (ValueError, jsonschema.ValidationError) as error:
                pytest.fail(f"seed {seed}: {error}: {text!r} for {random_schema(seed)}")
    assert num_complete >= 0.95 * NUM_SCHEMAS
    assert driver.stats.num_preemptions > 10
    assert crowded.num_mixed_steps > 10
