"""The cache of compiled grammars: what stays, what goes, what it says it holds."""

import time
from typing import cast

import pytest

from footplate.backend.structured.cache import GrammarCache, estimate_bytes
from footplate.backend.structured.interface import CompiledGrammar
from footplate.protocol.token_params import Grammar


def compiled(name: str) -> CompiledGrammar:
    return cast(CompiledGrammar, name)


def found(cache: GrammarCache, grammar: Grammar) -> object:
    return cache.get(grammar)


def key(number: int) -> Grammar:
    return Grammar(f"start: {number}")


def test_what_was_put_in_is_found_by_text_and_language() -> None:
    cache = GrammarCache()
    cache.put(key(1), compiled("one"), 10)
    assert found(cache, Grammar("start: 1")) == "one"
    assert found(cache, key(2)) is None
    assert cache.get(Grammar("start: 1", "other")) is None


@pytest.mark.parametrize("limits", [(3, 1000), (1000, 30)])
def test_the_least_recently_used_goes_first(limits: tuple[int, int]) -> None:
    cache = GrammarCache(*limits)
    for number in (1, 2, 3):
        cache.put(key(number), compiled(str(number)), 10)
    assert found(cache, key(1))
    cache.put(key(4), compiled("4"), 10)
    assert [number for number in (1, 2, 3, 4) if cache.get(key(number))] == [1, 3, 4]
    assert (len(cache), cache.num_bytes) == (3, 30)


def test_a_grammar_at_the_limit_is_kept_alone_and_one_over_it_is_not() -> None:
    cache = GrammarCache(max_bytes=100)
    cache.put(key(1), compiled("1"), 1)
    cache.put(key(2), compiled("2"), 101)
    assert (found(cache, key(1)), found(cache, key(2))) == ("1", None)
    cache.put(key(3), compiled("3"), 100)
    assert (found(cache, key(1)), found(cache, key(3)), cache.num_bytes) == (None, "3", 100)


def test_putting_a_grammar_in_again_replaces_it() -> None:
    cache = GrammarCache(max_bytes=100)
    cache.put(key(1), compiled("old"), 60)
    cache.put(key(1), compiled("new"), 50)
    assert (found(cache, key(1)), len(cache), cache.num_bytes) == ("new", 1, 50)


def test_a_hundred_thousand_grammars_stay_within_the_bounds() -> None:
    cache = GrammarCache(max_grammars=500, max_bytes=10_000)
    since = time.perf_counter()
    for number in range(100_000):
        cache.put(key(number), compiled("x"), number % 100)
        assert len(cache) <= 500 and cache.num_bytes <= 10_000
    assert time.perf_counter() - since < 5
    assert cache.get(key(99_999)) and found(cache, key(0)) is None


def test_larger_and_slower_grammars_are_taken_to_be_larger() -> None:
    small = estimate_bytes(Grammar("start: a"), 0.0)
    assert small > 65_000
    assert estimate_bytes(Grammar("x" * 1000), 0.0) > small + 200_000
    assert estimate_bytes(Grammar("start: a"), 0.1) > small + 5_000_000
