"""The table and the verdict on the client say what a reader must not miss."""

from footplate.frontend.benchmark.driver import Run
from footplate.frontend.benchmark.report import client_verdict, environment, table
from footplate.frontend.benchmark.summary import RequestRecord, summarize


def result(seconds_per_token: float) -> dict[str, float]:
    moments = [seconds_per_token * (i + 1) for i in range(4)]
    return summarize([RequestRecord(8, token_ids=[1, 2, 3, 4], moments=moments)], moments[-1])


def lines(text: str) -> dict[str, list[str]]:
    return {line[:34].strip(): line[34:].split() for line in text.splitlines()}


def test_one_engine_is_one_column() -> None:
    rows = lines(table({"footplate": result(0.1)}))
    assert rows["Output throughput (tok/s)"] == ["10.0"]
    assert rows["Time per output token, p99 (ms)"] == ["100.00"]


def test_two_engines_are_compared_by_the_ratio_of_their_rates_and_latencies() -> None:
    rows = lines(table({"ours": result(0.1), "theirs": result(0.2)}))
    assert rows["Output throughput (tok/s)"] == ["10.0", "5.0", "2.00"]
    assert rows["Time to first token, mean (ms)"] == ["100.00", "200.00", "0.50"]
    assert rows["Total input tokens"] == ["8", "8"]


def test_a_latency_that_one_of_them_lacks_is_a_dash() -> None:
    short = summarize([RequestRecord(8, token_ids=[1], moments=[1.0])], 1.0)
    rows = lines(table({"ours": result(0.1), "theirs": short}))
    assert rows["Inter-token latency, mean (ms)"] == ["100.00", "-"]


def test_a_late_client_is_warned_about() -> None:
    punctual = {"mean": 0.1, "median": 0.1, "std": 0.0, "p90": 0.2, "p99": 0.3, "max": 20.0}
    late = punctual | {"p99": 5.1}
    assert "WARNING" not in client_verdict(Run([], 1.0, punctual, 0.1))
    assert "WARNING" in client_verdict(Run([], 1.0, late, 0.1))
    assert "too short" in client_verdict(Run([], 0.001, {}, 0.1))


def test_the_environment_names_machine_versions_and_command() -> None:
    where = environment()
    assert where["cores"]
    assert where["command_line"]
    assert isinstance(where["versions"], dict)
    assert where["versions"]["footplate-llm"]
