"""A whole run, watched by audit hooks in both processes: no code and no object is made of data, no
command is run, nothing listens where it should not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDITED = Path(__file__).parent / "audited"
PATIENCE_S = 120.0


def run_watched(log: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What a program prints, and what the hooks of all its processes have to say."""
    paths = os.pathsep.join([str(AUDITED), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "AUDIT_LOG": str(log)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return done.stdout + done.stderr, lines


@pytest.mark.parametrize("model", ["fake", "demo"])
def test_a_whole_run_makes_no_code_of_data(tmp_path: Path, model: str) -> None:
    output, lines = run_watched(tmp_path / "log", str(AUDITED / "application.py"), model)
    assert output.endswith("served\n"), output
    watched = {line["process"] for line in lines if line["event"] == "watched"}
    assert len(watched) >= 2, "the core is watched as well"
    assert not [line for line in lines if line["event"] != "watched"]


MISDEEDS = {
    "pickle.find_class": "import pickle, os; pickle.loads(pickle.dumps(os.getpid))",
    "marshal.loads": "import marshal; marshal.loads(marshal.dumps(1))",
    "compile": "compile('1', '1', 'eval')",
    "exec": "eval('1')",
    "os.system": "import os; os.system('true')",
    "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
    "socket.bind": "import socket; socket.create_server(('0.0.0.0', 0))",
}


@pytest.mark.parametrize("event", MISDEEDS)
def test_a_misdeed_is_seen(tmp_path: Path, event: str) -> None:
    _, lines = run_watched(tmp_path / "log", "-c", MISDEEDS[event])
    assert event in {line["event"] for line in lines}


def test_what_is_usual_is_not_seen(tmp_path: Path) -> None:
    program = "import json, dataclasses, socket; socket.create_server(('127.0.0.1', 0))"
    _, lines = run_watched(tmp_path / "log", "-c", program)
    assert {line["event"] for line in lines} == {"watched"}
