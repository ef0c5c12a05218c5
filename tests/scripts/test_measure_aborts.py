"""The measurement of aborts runs, and aborts all that it says."""

from collections.abc import Callable
from types import ModuleType

import pytest


def test_running_waiting_and_held_requests_are_aborted(
    load_script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("measure_aborts")
    script.main(num_requests=200, num_running=16, num_siblings=10, repeats=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["abort", "tell"]
    assert all(float(line.split()[2]) > 0 for line in lines)
