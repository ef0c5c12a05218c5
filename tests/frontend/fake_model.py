"""What `model="fake"` must answer, computed here, and a tokenizer for its vocabulary."""

import json
import string
from itertools import islice, product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.runner.load import DEMO_MODEL
from footplate.protocol.token_params import TokenParams

VOCAB_SIZE: int = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
NUM_SPECIAL = 16  # ids below are never produced


def expected_token_ids(
    prompt: list[int], count: int, *, seed: int = 0, temperature: float = 1.0
) -> list[int]:
    """The output for a prompt: a pure function of it, and of the seed unless greedy."""
    params = TokenParams(temperature, 1.0, 0, 0.0, seed, count, 0, ())
    token_ids = list(prompt)
    for position in range(count):
        digest = digest_prefix(token_ids)
        token_ids.append(next_token(digest, position, params, VOCAB_SIZE, NUM_SPECIAL))
    return token_ids[len(prompt) :]


def write_tokenizer(folder: Path) -> None:
    """Byte-level, and as large as the fake model's vocabulary: special tokens, every byte, pairs
    of letters. Encodes to bytes, decodes anything."""
    pieces = [f"<special {number}>" for number in range(NUM_SPECIAL)]
    pieces += sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = map("".join, product(string.ascii_letters, repeat=2))
    pieces += islice(pairs, VOCAB_SIZE - len(pieces))
    assert len(pieces) == VOCAB_SIZE
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    config = {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
