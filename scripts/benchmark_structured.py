#!/usr/bin/env python3
"""Measure what a grammar costs: its compilation, and the mask of every token.

scripts/benchmark_structured.py                        # 32 rows, 32,000 synthetic tokens
scripts/benchmark_structured.py --tokenizer FOLDER     # a model's own vocabulary
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from footplate.backend.structured.interface import CompiledGrammar, Matcher
from footplate.backend.structured.llguidance_engine import LlguidanceEngine
from footplate.frontend.structured import GrammarTranslator
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import Grammar

EOS = 1
STEP_MS = 46.0  # 32 requests of llama-160m on two cores

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["customer", "supplier", "employee"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{6}$"},
        "buyer": {"$ref": "#/$defs/person"},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string"},
                    "price": {"type": "number", "minimum": 0},
                },
                "required": ["sku", "price"],
            },
        },
    },
    "required": ["id", "buyer", "lines"],
    "$defs": {"person": PERSON},
}
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value"],
        }
    },
}
GRAMMARS = {
    "person": StructuredOutputsParams(json=PERSON),
    "order": StructuredOutputsParams(json=ORDER),
    "tree": StructuredOutputsParams(json=TREE),
    "any object": StructuredOutputsParams(json_object=True),
    "100 properties": StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {f"field_{i}": {"type": "string"} for i in range(100)},
        }
    ),
    "regex": StructuredOutputsParams(regex=r"(\d{1,3}\.){3}\d{1,3}( [a-z ]+)*"),
    "1000 choices": StructuredOutputsParams(choice=[f"choice {i}" for i in range(1000)]),
}


def synthetic_tokenizer(folder: Path, num_tokens: int) -> None:
    """A byte-level BPE of `num_tokens` tokens that look like pieces of words, numbers, JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng = random.Random(0)
    letters = [*"etaoinshrdlucmfwypvbgkqxz0123456789", *'{}[]":,.-_/', "Ġ"]
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges: list[tuple[str, str]] = []
    tokens = list(letters)
    while len(vocab) < num_tokens:
        left = rng.choice(tokens)
        right = rng.choice(letters if rng.random() < 0.5 else tokens)
        if len(left + right) <= 12 and "Ġ" not in right and left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
            tokens.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def mask_ms(
    compiled: CompiledGrammar, num_rows: int, num_steps: int, vocab_size: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of the masks of all rows, and of advancing all rows, for each step.

    Tokens are drawn from the masks, so rows drift apart; what is complete begins anew.
    """
    rng = np.random.default_rng(0)
    masks: npt.NDArray[np.int32] = np.zeros((num_rows, (vocab_size + 31) // 32), np.int32)
    matchers: list[Matcher] = [compiled.start() for _ in range(num_rows)]
    fill, advance = [], []
    for _ in range(num_steps):
        since = time.perf_counter()
        for matcher, mask in zip(matchers, masks, strict=True):
            matcher.fill_mask(mask)
        fill.append(1e3 * (time.perf_counter() - since))
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        tokens = [int(rng.choice(np.flatnonzero(row))) for row in bits]
        since = time.perf_counter()
        ended = [m.advance([token]) for m, token in zip(matchers, tokens, strict=True)]
        advance.append(1e3 * (time.perf_counter() - since))
        for row in np.flatnonzero(ended):
            matchers[row] = compiled.start()
    return fill, advance


def timed_compile(engine: LlguidanceEngine, grammar: Grammar) -> tuple[CompiledGrammar, float]:
    """The compiled grammar and milliseconds."""
    since = time.perf_counter()
    compiled = engine.compile(grammar)
    return compiled, 1e3 * (time.perf_counter() - since)


def main() -> None:
    """All grammars, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--eos", type=int, default=EOS)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.tokenizer or Path(made)
        if args.tokenizer is None:
            synthetic_tokenizer(folder, args.vocab)
        engine = LlguidanceEngine(str(folder), args.vocab, (args.eos,))
        _, ms = timed_compile(engine, Grammar('start: "a"'))
        print(f"vocabulary of {args.vocab} tokens: {ms:.0f} ms, once")
    print(f"{args.rows} rows, {args.steps} steps; a step of the model takes {STEP_MS:g} ms\n")
    print(
        f"{'grammar':16}{'check':>9}{'compile':>9}{'copy':>9}{'mask p50':>10}{'p99':>9}"
        f"{'advance':>9}{'all rows':>10}{'of step':>9}"
    )
    print(f"{'':16}{'ms':>9}{'ms':>9}{'us':>9}{'us/row':>10}{'us/row':>9}{'us/row':>9}{'ms':>10}")
    for name, params in GRAMMARS.items():
        since = time.perf_counter()
        grammar = GrammarTranslator().translate(params)
        check = 1e3 * (time.perf_counter() - since)
        compiled, compile_ms = timed_compile(engine, grammar)
        since = time.perf_counter()
        for _ in range(100):
            compiled.start()
        copy_us = 1e4 * (time.perf_counter() - since)
        fill, advance = mask_ms(compiled, args.rows, args.steps, args.vocab)
        per_row = [1e3 * ms / args.rows for ms in fill]
        p50, p99 = statistics.median(per_row), statistics.quantiles(per_row, n=100)[98]
        advance_us = 1e3 * statistics.median(advance) / args.rows
        both = statistics.mean(fill) + statistics.mean(advance)
        print(
            f"{name:16}{check:9.2f}{compile_ms:9.2f}{copy_us:9.1f}{p50:10.1f}{p99:9.1f}"
            f"{advance_us:9.1f}{both:10.2f}{both / STEP_MS:9.1%}"
        )


if __name__ == "__main__":
    main()
