"""Sets of tokens: what they leave of a row, and how many of them are kept."""

import math

import numpy as np
import pytest

from footplate.backend.logits.token_set import TokenSet, TokenSets


def mask_of(token_ids: set[int], vocab_size: int) -> np.ndarray:
    bits = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_row_keeps_the_logits_of_the_set_and_nothing_else(share: float, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    inside = {i for i in range(vocab_size) if rng.random() < share}
    tokens = TokenSet(mask_of(inside, vocab_size), vocab_size)
    logits = rng.normal(size=vocab_size).astype(np.float32)
    row = logits.copy()
    tokens.restrict(row)
    assert row.tolist() == [logits[i] if i in inside else -math.inf for i in range(vocab_size)]
    assert tokens.num_tokens == len(inside)
    some = np.arange(0, vocab_size, 3)
    assert tokens.count(some) == len(inside & set(some.tolist()))


def test_bits_behind_the_vocabulary_are_nobodys() -> None:
    assert TokenSet(np.full(2, -1, np.int32), 33).num_tokens == 33


@pytest.mark.parametrize("inside", [{1}, set(range(40)), set(range(100)) - {1}])
def test_nan_and_infinity_are_still_no_numbers_afterwards(inside: set[int]) -> None:
    row = np.zeros(100, np.float32)
    row[min(inside)], row[max(inside)] = np.nan, np.inf
    TokenSet(mask_of(inside, 100), 100).restrict(row)
    assert row[max(inside)] == np.inf
    assert not np.isfinite(row[min(inside)])


def test_a_mask_that_came_before_has_a_set() -> None:
    sets = TokenSets()
    first = sets.of(mask_of({1, 2}, 64), 64)
    assert sets.of(mask_of({1, 2}, 64), 64) is first
    assert sets.of(mask_of({1, 2}, 64), 63) is not first
    assert sets.of(mask_of({1}, 64), 64) is not first


def test_sets_that_were_not_asked_for_lately_go_first() -> None:
    sets = TokenSets(max_bytes=3 * 6 * 64)
    first, second = (sets.of(mask_of({i}, 64), 64) for i in range(2))
    for i in range(2, 50):
        sets.of(mask_of({i}, 64), 64)
        assert sets.of(mask_of({0}, 64), 64) is first
        assert len(sets) <= 3
    assert sets.of(mask_of({1}, 64), 64) is not second
