"""The covering arrays that other tests rely on."""

from itertools import combinations

from .pairwise import Row, covering_rows

LEVELS = {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2, 3], "d": [0, 1], "e": [0, 1, 2]}


def not_both(row: Row) -> bool:
    return not (row.get("a") == 1 and row.get("b") == 1)


def test_every_pair_that_may_meet_does_and_no_other() -> None:
    rows = covering_rows(LEVELS, not_both)
    assert all(row.keys() == LEVELS.keys() and not_both(row) for row in rows)
    for (a, first), (b, second) in combinations(LEVELS.items(), 2):
        for i in range(len(first)):
            for j in range(len(second)):
                met = any(row[a] == i and row[b] == j for row in rows)
                assert met == not_both({a: i, b: j}), (a, i, b, j)


def test_there_are_far_fewer_rows_than_combinations() -> None:
    assert 12 <= len(covering_rows(LEVELS, lambda row: True)) <= 20


def test_a_seed_gives_the_same_rows_again() -> None:
    assert covering_rows(LEVELS, not_both, 5) == covering_rows(LEVELS, not_both, 5)
