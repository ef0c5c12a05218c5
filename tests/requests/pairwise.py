"""Covering arrays: few combinations of parameters in which every pair of values meets.

Most failures of combinations need two values to meet, not three (Kuhn, Wallace and Gallo 2004,
"Software Fault Interactions"). The greedy construction is that of AETG (Cohen et al. 1997).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Row = dict[str, int]
Pair = tuple[tuple[str, int], tuple[str, int]]

NUM_CANDIDATES = 20


def covering_rows(
    levels: Mapping[str, Sequence[Any]], is_legal: Callable[[Row], bool], seed: int = 0
) -> list[Row]:
    """Rows of level indices in which every pair of levels that may meet does.

    Args:
        levels: the values of each parameter, the first one its default.
        is_legal: whether the levels of a row, or of part of one, go together.
    """
    dice = Random(seed)
    places = {name: number for number, name in enumerate(levels)}
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(levels, 2)
        for i in range(len(levels[a]))
        for j in range(len(levels[b]))
        if is_legal({a: i, b: j})
    }
    rows = []
    while missing:
        pair = dice.choice(sorted(missing))
        candidates = [
            _grow(dict(pair), levels, is_legal, missing, places, dice)
            for _ in range(NUM_CANDIDATES)
        ]
        row = max(candidates, key=lambda candidate: len(_pairs(candidate, places) & missing))
        missing -= _pairs(row, places)
        rows.append(row)
    return rows


def _grow(
    row: Row,
    levels: Mapping[str, Sequence[Any]],
    is_legal: Callable[[Row], bool],
    missing: set[Pair],
    places: Mapping[str, int],
    dice: Random,
) -> Row:
    """Give every other parameter, in random order, the legal level that meets the most."""
    order = [name for name in levels if name not in row]
    dice.shuffle(order)
    for name in order:
        legal = [i for i in range(len(levels[name])) if is_legal({**row, name: i})]
        dice.shuffle(legal)
        row[name] = max(
            legal,
            key=lambda index: sum(
                _pair(places, (name, index), other) in missing for other in row.items()
            ),
        )
    return row


def _pairs(row: Row, places: Mapping[str, int]) -> set[Pair]:
    return {_pair(places, a, b) for a, b in combinations(row.items(), 2)}


def _pair(places: Mapping[str, int], a: tuple[str, int], b: tuple[str, int]) -> Pair:
    return (a, b) if places[a[0]] < places[b[0]] else (b, a)
