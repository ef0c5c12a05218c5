"""The sampler's benchmark runs."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch


def test_all_limits_are_measured_on_rows_of_all_kinds(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load_script("benchmark_sampler")
    threads = torch.get_num_threads()
    sizes = ["--vocab", "50", "--rows", "11", "--rounds", "1", "--threads", str(threads)]
    monkeypatch.setattr(sys, "argv", ["benchmark_sampler.py", *sizes, "--torch"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * (len(script.LIMITS) + 1)
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])
