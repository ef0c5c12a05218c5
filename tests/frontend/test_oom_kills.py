"""Counts of the system, where there are some."""

from pathlib import Path

import pytest

from footplate.frontend import oom_kills
from footplate.frontend.oom_kills import count_oom_kills


def test_the_own_groups_count_is_taken_before_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oom_kills, "_CGROUPS", tmp_path)
    (tmp_path / "own").write_text("1:cpu:/x\n0::/a/b\n")
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 9\n")
    assert count_oom_kills(tmp_path / "own", tmp_path / "vmstat") == 9
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.events").write_text("oom 5\noom_kill 3\n")
    assert count_oom_kills(tmp_path / "own", tmp_path / "vmstat") == 3


def test_where_nobody_counts_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("oom_kill many\n\n")
    assert count_oom_kills(tmp_path / "none", tmp_path / "none") == 0
    assert count_oom_kills(tmp_path / "garbage", tmp_path / "garbage") == 0


def test_this_machine_has_a_count() -> None:
    assert count_oom_kills() >= 0
