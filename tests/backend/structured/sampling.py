"""Outputs as a model without any idea would write them: random tokens, as the masks allow."""

from dataclasses import dataclass, field
from random import Random

import numpy as np
from tokenizers import Tokenizer

from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.structured.interface import Matcher
from footplate.backend.structured.llguidance_engine import LlguidanceEngine

VOCAB_SIZE = 2048
EOS = 4
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
TOKENS = [TOKENIZER.id_to_token(token_id) or "" for token_id in range(VOCAB_SIZE)]
# Tokens that bring a JSON text nearer to its end.
CLOSING = np.array([token[:1] in ('"', "}", "]") for token in TOKENS])
CLOSING[EOS] = True


def demo_engine(eos_token_ids: tuple[int, ...] = (EOS,)) -> LlguidanceEngine:
    return LlguidanceEngine(str(DEMO_MODEL), VOCAB_SIZE, eos_token_ids)


def allowed(matcher: Matcher, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Ids of the tokens that may come next."""
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    matcher.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    is_complete: bool = False

    @property
    def text(self) -> str:
        text: str = TOKENIZER.decode([t for t in self.token_ids if t != EOS])
        return text


def sample(matcher: Matcher, seed: int, max_tokens: int = 2000, haste: float = 0.6) -> Output:
    """Sample to the end, or to `max_tokens`.

    Args:
        haste: how often a token that closes something is preferred, where one may come.
    """
    rng = Random(seed)
    output = Output()
    while len(output.token_ids) < max_tokens:
        candidates = allowed(matcher)
        closing = candidates[CLOSING[candidates]]
        late = len(output.token_ids) > max_tokens // 4
        if closing.size and rng.random() < (0.95 if late else haste):
            candidates = closing
        output.token_ids.append(int(rng.choice(candidates)))
        if matcher.advance(output.token_ids[-1:]):
            output.is_complete = True
            break
    return output
