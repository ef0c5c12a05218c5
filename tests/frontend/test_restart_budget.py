"""How often a core is replaced."""

import pytest

from footplate.frontend.restart_budget import FIRST_DELAY_S, MAX_DELAY_S, RestartBudget


def test_a_core_that_served_is_replaced_at_once() -> None:
    budget = RestartBudget(3, 60.0)
    assert [budget.spend(now, had_served=True) for now in (0.0, 1.0, 2.0)] == [0.0, 0.0, 0.0]


def test_more_restarts_than_allowed_are_refused_until_the_window_has_passed() -> None:
    budget = RestartBudget(2, 60.0)
    budget.spend(0.0, had_served=True)
    budget.spend(10.0, had_served=True)
    assert budget.spend(20.0, had_served=True) is None
    assert budget.spend(60.0, had_served=True) is None, "the first is in the window still"
    assert budget.spend(60.5, had_served=True) == 0.0
    assert budget.spend(69.0, had_served=True) is None
    assert budget.spend(70.5, had_served=True) == 0.0


def test_a_refusal_spends_nothing() -> None:
    budget = RestartBudget(1, 60.0)
    budget.spend(0.0, had_served=True)
    for now in range(1, 60):
        assert budget.spend(float(now), had_served=True) is None
    assert budget.spend(61.0, had_served=True) == 0.0


@pytest.mark.parametrize("had_served", [True, False])
def test_a_budget_of_nothing_allows_nothing(had_served: bool) -> None:
    assert RestartBudget(0, 60.0).spend(0.0, had_served=had_served) is None


def test_a_core_that_does_not_start_waits_twice_as_long_each_time_up_to_a_limit() -> None:
    budget = RestartBudget(100, 60.0)
    delays = [budget.spend(0.0, had_served=False) for _ in range(7)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert (FIRST_DELAY_S, MAX_DELAY_S) == (0.5, 8.0)


def test_a_core_that_served_ends_a_row_of_failed_starts() -> None:
    budget = RestartBudget(100, 60.0)
    budget.spend(0.0, had_served=False)
    budget.spend(0.0, had_served=False)
    assert budget.spend(0.0, had_served=True) == 0.0
    assert budget.spend(0.0, had_served=False) == FIRST_DELAY_S


def test_failed_starts_may_go_on_for_ever_where_the_window_is_short() -> None:
    budget = RestartBudget(1, 1.0)
    for count in range(2000):
        assert budget.spend(10.0 * count, had_served=False) is not None
