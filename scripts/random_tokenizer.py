"""A tokenizer for models with random weights: a byte-level BPE of any size, the same every time.

Nothing is trained. Behind two special tokens and the 256 bytes come all pairs of letters, the
characters of two bytes, and longer and longer words, with and without a space before them. So every
token that a random model chooses has a text, and some are parts of characters; and every text has
tokens.
"""

import json
from collections.abc import Generator, Iterator
from itertools import chain, islice
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<s>", "</s>"
EOS_TOKEN_ID = 1
# Of UTF-8: U+0080 to U+07FF.
TWO_BYTES = range(0x80, 0x800)


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Return one of exactly so many tokens, which must be more than its bytes are."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    single = [BOS, EOS, *sorted(byte_level.alphabet())]
    merges = list(islice(_merges(), vocab_size - len(single)))
    tokens = chain(single, (left + right for left, right in merges))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS)])
    return tokenizer


def save_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write its two files into a model's folder."""
    make_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _merges() -> Iterator[tuple[str, str]]:
    """Two tokens that are one together, without end. A byte is spelled as byte-level BPEs do."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    ((space, _),) = spell(" ")
    words = [*ascii_lowercase, space]
    words = yield from _longer(words)
    for code in TWO_BYTES:
        ((spelled, _),) = spell(chr(code))
        yield spelled[0], spelled[1]
    while True:
        words = yield from _longer(words)


def _longer(words: list[str]) -> Generator[tuple[str, str], None, list[str]]:
    """Each of the words with each letter behind it. Returns them."""
    yield from ((word, letter) for word in words for letter in ascii_lowercase)
    return [word + letter for word in words for letter in ascii_lowercase]
