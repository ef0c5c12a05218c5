"""Several engines doing the same work in turn: medians over rounds, and ratios within them.

A machine drifts within minutes. What one round measured was measured side by side, so a ratio is
of two results of one round, and rounds agree on it where they do not agree on either.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Engine = TypeVar("_Engine")

# By engine, what `summarize` and the start gave in one round. An engine that failed is not there.
Round = Mapping[str, Mapping[str, float]]

_METRICS = (
    ("output_throughput", "output tok/s", "{:.1f}"),
    ("total_token_throughput", "total tok/s", "{:.1f}"),
    ("median_ttft_ms", "TTFT ms", "{:.1f}"),
    ("median_tpot_ms", "TPOT ms", "{:.2f}"),
    ("p99_itl_ms", "ITL p99 ms", "{:.2f}"),
    ("start_s", "start s", "{:.2f}"),
)
# The ratio of total tokens is that of output tokens: the work is the same.
_RATIOS = tuple(metric for metric in _METRICS if metric[0] != "total_token_throughput")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of one engine's results to another's: the median over rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def turns(engines: Sequence[_Engine], round_number: int) -> list[_Engine]:
    """The order of a round: every second one backwards, so that a machine that grows slower or
    faster favours each of two engines in turn."""
    return list(engines if round_number % 2 == 0 else reversed(engines))


def medians(rounds: Sequence[Round], engine: str) -> dict[str, float]:
    """Each of an engine's results, over the rounds that have it."""
    results = [results[engine] for results in rounds if engine in results]
    keys = dict.fromkeys(key for result in results for key in result)
    return {
        key: statistics.median(result[key] for result in results if key in result) for key in keys
    }


def ratios(rounds: Sequence[Round], ours: str, theirs: str) -> dict[str, Ratio]:
    """Ours to theirs, over the rounds that have both."""
    values: dict[str, list[float]] = {}
    for results in rounds:
        if ours in results and theirs in results:
            for key, value in results[ours].items():
                if their_value := results[theirs].get(key):
                    values.setdefault(key, []).append(value / their_value)
    return {
        key: Ratio(statistics.median(each), min(each), max(each)) for key, each in values.items()
    }


def comparison_table(rounds: Sequence[Round], engines: Sequence[str], ours: str) -> str:
    """Medians of all engines, and the ratios of ours to each of the others."""
    width = 2 + max(map(len, engines))
    lines = [_line("", [head for _, head, _ in _METRICS], width, 14)]
    for engine in engines:
        results = medians(rounds, engine)
        cells = [_cell(form, results.get(key)) for key, _, form in _METRICS]
        lines.append(_line(engine, cells, width, 14))
    others = [engine for engine in engines if engine != ours]
    if others:
        lines += ["", f"Ratio of {ours} to"]
        lines.append(_line("", [head.removesuffix(" ms") for _, head, _ in _RATIOS], width, 20))
    for engine in others:
        found = ratios(rounds, ours, engine)
        lines.append(_line(engine, [str(found.get(key, "-")) for key, *_ in _RATIOS], width, 20))
    return "\n".join(lines)


def _cell(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def _line(label: str, cells: Sequence[str], width: int, cell_width: int) -> str:
    return f"{label:<{width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells)
