"""Throughput and latencies by their definitions, on records made by hand."""

import pytest

from footplate.frontend.benchmark.summary import (
    RequestRecord,
    count_equal,
    percentile,
    spread,
    summarize,
)


def record(sent: float, *moments: float, num_tokens: int | None = None) -> RequestRecord:
    num_tokens = len(moments) if num_tokens is None else num_tokens
    return RequestRecord(10, sent, sent, list(range(num_tokens)), list(moments))


def test_latencies_are_measured_from_sending() -> None:
    one = record(5.0, 5.5, 5.6, 5.9)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2el_s == pytest.approx(0.9)
    assert one.itls_s == pytest.approx([0.1, 0.3])


def test_time_per_output_token_leaves_the_first_token_out() -> None:
    assert record(0.0, 1.0, 1.1, 1.2).tpot_s == pytest.approx(0.1)


def test_an_output_of_several_tokens_is_one_gap_and_several_tokens() -> None:
    one = record(0.0, 1.0, 1.4, num_tokens=5)
    assert one.itls_s == pytest.approx([0.4])
    assert one.tpot_s == pytest.approx(0.1)


def test_throughput_counts_what_completed() -> None:
    failed = record(0.0, 1.0)
    failed.error = "it broke"
    result = summarize([record(0.0, 1.0, 2.0), record(0.0, 1.0), failed], 4.0)
    assert result["completed"] == 2
    assert result["failed"] == 1
    assert result["total_input_tokens"] == 20
    assert result["total_output_tokens"] == 3
    assert result["request_throughput"] == 0.5
    assert result["output_throughput"] == 0.75
    assert result["total_token_throughput"] == 5.75


def test_a_request_without_tokens_has_failed() -> None:
    assert summarize([record(0.0)], 1.0)["failed"] == 1


def test_a_request_whose_moments_nobody_knows_has_tokens_and_no_latencies() -> None:
    result = summarize([record(0.0, num_tokens=4)], 2.0)
    assert result["completed"] == 1
    assert result["output_throughput"] == 2
    assert not [key for key in result if key.endswith("_ms")]


def test_keys_are_those_of_vllm() -> None:
    result = summarize([record(0.0, 1.0, 2.0)], 2.0)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "std", "p90", "p99"):
            assert f"{kind}_{metric}_ms" in result
    assert result["mean_ttft_ms"] == 1000


def test_one_token_per_request_has_no_time_per_output_token() -> None:
    result = summarize([record(0.0, 1.0), record(0.0, 2.0)], 2.0)
    assert "mean_tpot_ms" not in result
    assert "mean_itl_ms" not in result
    assert result["p90_ttft_ms"] == pytest.approx(1900)


def test_nothing_completed_is_no_error() -> None:
    assert summarize([], 1.0)["output_throughput"] == 0


@pytest.mark.parametrize(
    ("q", "value"), [(0, 1.0), (50, 3.0), (100, 5.0), (90, 4.6), (25, 2.0), (99, 4.96)]
)
def test_percentiles_are_linear_between_neighbours(q: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], q) == pytest.approx(value)


def test_the_spread_of_one_value_is_that_value() -> None:
    assert spread([2.0]) == {"mean": 2.0, "median": 2.0, "std": 0.0, "p90": 2.0, "p99": 2.0}


def test_requests_are_equal_when_all_their_tokens_are() -> None:
    ours = [record(0.0, 1.0, 2.0), record(0.0, 1.0)]
    theirs = [record(0.0, 8.0, 9.0), record(0.0, 1.0, 2.0)]
    assert count_equal(ours, theirs) == 1
