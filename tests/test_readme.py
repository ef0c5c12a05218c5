"""What the README shows is run, as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_eight_lines_of_python_run_as_they_stand(tmp_path: Path) -> None:
    program = code_blocks("python")[0]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "So that your event loop never waits" in done.stdout
    assert not done.stderr


def test_every_script_that_the_readme_names_is_there() -> None:
    names = set(re.findall(r"scripts/[\w.]+", README))
    assert {"scripts/demo", "scripts/test", "scripts/launch_engine.py"} <= names
    for name in names:
        assert (ROOT / name).is_file(), name


def test_every_link_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
