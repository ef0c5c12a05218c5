"""What was measured, as a table for people and as a dictionary for files; and on what."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from footplate.frontend.benchmark.driver import MAX_CLIENT_LAG_MS, Run

_COUNTS = (
    ("Successful requests", "completed", "{:.0f}"),
    ("Failed requests", "failed", "{:.0f}"),
    ("Duration (s)", "duration", "{:.2f}"),
    ("Total input tokens", "total_input_tokens", "{:.0f}"),
    ("Total output tokens", "total_output_tokens", "{:.0f}"),
    ("Request throughput (req/s)", "request_throughput", "{:.2f}"),
    ("Output throughput (tok/s)", "output_throughput", "{:.1f}"),
    ("Total throughput (tok/s)", "total_token_throughput", "{:.1f}"),
)
_LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_SPREADS = ("mean", "median", "p90", "p99")
_PACKAGES = ("footplate-llm", "torch", "transformers", "msgspec", "pyzmq", "uvloop")


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Results of `summarize` side by side; two of them also as a ratio of the first to the
    second."""
    names = list(columns)
    heads = [*names, "ratio"] if len(names) == 2 else names
    lines = [_line("", heads)]
    for label, key, form in _COUNTS:
        is_rate = key.endswith("throughput")
        lines.append(_line(label, _cells(columns, key, form, with_ratio=is_rate)))
    for metric, label in _LATENCIES.items():
        for kind in _SPREADS:
            key = f"{kind}_{metric}_ms"
            if any(key in results for results in columns.values()):
                cells = _cells(columns, key, "{:.2f}", with_ratio=True)
                lines.append(_line(f"{label}, {kind} (ms)", cells))
    return "\n".join(lines)


def _cells(
    columns: Mapping[str, Mapping[str, float]], key: str, form: str, *, with_ratio: bool
) -> list[str]:
    values = [results.get(key) for results in columns.values()]
    cells = ["-" if value is None else form.format(value) for value in values]
    if with_ratio and len(values) == 2 and values[0] is not None and values[1]:
        cells.append(f"{values[0] / values[1]:.2f}")
    return cells


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<34}" + "".join(f"{cell:>14}" for cell in cells)


def client_verdict(run: Run) -> str:
    """One line about the client itself: a benchmark can only be as good as its clock."""
    lag = run.loop_lag_ms
    if not lag:
        return "Client: the run was too short to judge the client."
    line = (
        f"Client: event loop lag mean {lag['mean']:.2f}, p99 {lag['p99']:.2f}, max "
        f"{lag['max']:.2f} ms; {run.client_cpu_share:.0%} of a core."
    )
    if run.client_was_bottleneck:
        line += (
            f"\nWARNING: the client was late by more than {MAX_CLIENT_LAG_MS:g} ms: the latencies "
            "are partly its own. Use fewer requests at once, or more or quieter cores."
        )
    return line


def environment() -> dict[str, object]:
    """Where this process runs: enough to know whether two results may be compared."""
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_sha": _git_sha(),
        "command_line": shlex.join(sys.argv),
    }


def num_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    """Of the checkout this file is in, with a plus sign if it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        described = subprocess.run(
            [*command, "--exclude=*", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
