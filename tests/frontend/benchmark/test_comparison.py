"""Medians and ratios over rounds: a machine that drifts must not decide who is faster."""

import pytest

from footplate.frontend.benchmark.comparison import (
    Ratio,
    comparison_table,
    medians,
    ratios,
    turns,
)


def rates(**engines: float) -> dict[str, dict[str, float]]:
    return {name: {"output_throughput": rate} for name, rate in engines.items()}


def test_every_second_round_runs_backwards() -> None:
    assert [turns(["a", "b", "c"], number) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine drifts: the ratio of the medians would be 3.
    rounds = [rates(ours=300, theirs=100), rates(ours=100, theirs=50), rates(ours=600, theirs=400)]
    assert ratios(rounds, "ours", "theirs")["output_throughput"] == Ratio(2.0, 1.5, 3.0)


def test_a_round_in_which_one_failed_counts_for_the_others() -> None:
    rounds = [rates(ours=10, theirs=5, other=20), rates(ours=30, other=10)]
    assert medians(rounds, "ours")["output_throughput"] == 20
    assert medians(rounds, "theirs")["output_throughput"] == 5
    assert ratios(rounds, "ours", "theirs")["output_throughput"] == Ratio(2.0, 2.0, 2.0)
    assert ratios(rounds, "ours", "other")["output_throughput"].high == 3.0


@pytest.mark.parametrize("theirs", [{}, {"median_ttft_ms": 0.0}])
def test_what_an_engine_does_not_tell_has_no_ratio(theirs: dict[str, float]) -> None:
    rounds = [{"ours": {"median_ttft_ms": 3.0}, "theirs": theirs}]
    assert ratios(rounds, "ours", "theirs") == {}


def test_the_table_has_a_line_per_engine_and_one_per_ratio() -> None:
    rounds = [
        {"ours": {"output_throughput": 300.0, "median_ttft_ms": 10.0}, "theirs": rate}
        for rate in ({"output_throughput": 100.0}, {"output_throughput": 150.0})
    ]
    table = comparison_table(rounds, ["ours", "theirs"], "ours")
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["ours", "300.0", "-", "10.0", "-", "-", "-"]
    assert lines[2] == ["theirs", "125.0", "-", "-", "-", "-", "-"]
    assert lines[4] == ["Ratio", "of", "ours", "to"]
    assert lines[6] == ["theirs", "2.50", "(2.00-3.00)", "-", "-", "-", "-"]
    assert len(lines) == 7


def test_one_engine_alone_has_nobody_to_be_compared_with() -> None:
    assert "Ratio" not in comparison_table([rates(ours=1.0)], ["ours"], "ours")
