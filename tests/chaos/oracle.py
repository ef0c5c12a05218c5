"""What `model="fake"` must answer: a pure function of the prompt, computed here."""

import json

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.runner.load import DEMO_MODEL
from footplate.protocol.token_params import TokenParams

VOCAB_SIZE: int = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
NUM_SPECIAL = 16


def expected_tokens(
    prompt: list[int], count: int, *, seed: int = 0, temperature: float = 0.0
) -> list[int]:
    """The first tokens behind a prompt; of the seed, too, unless greedy."""
    params = TokenParams(temperature, 1.0, 0, 0.0, seed, count, 0, ())
    digest = digest_prefix(prompt)
    token_ids: list[int] = []
    for position in range(count):
        token_ids.append(next_token(digest, position, params, VOCAB_SIZE, NUM_SPECIAL))
        digest = digest_prefix(token_ids[-1:], digest)
    return token_ids
