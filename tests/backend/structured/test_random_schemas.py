"""Three hundred schemas, and outputs of random tokens: what is complete is valid."""

import json

import jsonschema
import pytest

from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.structured import GrammarTranslator
from footplate.protocol.structured import StructuredOutputsParams

from .random_schemas import random_schema
from .sampling import demo_engine, sample

NUM_SCHEMAS = 300
SCHEMAS_PER_TEST = 50


@pytest.fixture(scope="module")
def engine() -> LlguidanceEngine:
    return demo_engine()


@pytest.mark.parametrize("first_seed", range(0, NUM_SCHEMAS, SCHEMAS_PER_TEST))
def test_outputs_of_random_tokens_parse_and_validate(
    engine: LlguidanceEngine, first_seed: int
) -> None:
    num_complete = 0
    for seed in range(first_seed, first_seed + SCHEMAS_PER_TEST):
        schema = random_schema(seed)
        grammar = GrammarTranslator().translate(StructuredOutputsParams(json=schema))
        output = sample(engine.compile(grammar).start(), seed)
        num_complete += output.is_complete
        if output.is_complete:
            try:
                jsonschema.validate(json.loads(output.text), schema)
            except ValueError as error:
                pytest.fail(f"seed {seed}: {error}: {output.text!r} for {json.dumps(schema)}")
            except jsonschema.ValidationError as error:
                pytest.fail(f"seed {seed}: {error.message}: {output.text!r} for {schema}")
    assert num_complete >= 0.97 * SCHEMAS_PER_TEST
