"""The tokenizer of models with random weights."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.text import load_tokenizer
from footplate.protocol.token_params import Grammar

LoadScript = Callable[[str], ModuleType]
TEXT = "The engine returns Größe, äöü € and 漢字 🚂.\n"


@pytest.mark.parametrize("vocab_size", [300, 1000, 32_000])
def test_it_has_so_many_tokens_each_with_a_text_and_every_text_has_tokens(
    load_script: LoadScript, tmp_path: Path, vocab_size: int
) -> None:
    load_script("random_tokenizer").save_tokenizer(vocab_size, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == vocab_size
    assert all(tokenizer.text_of_token(token_id) for token_id in range(vocab_size))
    token_ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(token_ids) == TEXT
    assert len(token_ids) < len(TEXT.encode()), "some tokens are longer than a byte"


def test_its_end_is_the_models_and_allowed_where_a_grammar_ends(
    load_script: LoadScript, tmp_path: Path
) -> None:
    script, folder = load_script("random_model"), tmp_path / "model"
    script.make("llama-tiny", tokenizer=True, folder=folder)
    tokenizer = load_tokenizer(str(folder))
    (end,) = tokenizer.eos_token_ids
    assert f'"eos_token_id": {end}' in (folder / "config.json").read_text()

    grammar = LlguidanceEngine(str(folder), tokenizer.vocab_size, (end,)).compile(
        Grammar("start: /¥§[a-z]*/")
    )
    matcher, mask = grammar.start(), np.zeros((tokenizer.vocab_size + 31) // 32, np.int32)
    allowed = []
    for text in ("", "¥§"):
        matcher.advance(tokenizer.encode(text))
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed.append({tokenizer.text_of_token(int(each)) for each in bits.nonzero()[0]})
    assert "¥" in allowed[0] and allowed[0].isdisjoint({"</s>", "a"})
    assert {"</s>", "a", "zz"} < allowed[1] and "¥" not in allowed[1]


def test_without_one_there_is_no_end(load_script: LoadScript, tmp_path: Path) -> None:
    load_script("random_model").make("llama-tiny", folder=tmp_path / "model")
    assert not (tmp_path / "model/tokenizer.json").exists()
    assert '"eos_token_id": null' in (tmp_path / "model/config.json").read_text()
