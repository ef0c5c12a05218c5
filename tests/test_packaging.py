"""What is in the repository is what is installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("frontend", "backend", "protocol")
DEMO_MODEL = Path("backend/models/demo")


def setuptools_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return dict(settings["setuptools"])


def python_folders() -> set[str]:
    return {
        ".".join(("footplate", *init.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for init in (ROOT / layer).rglob("__init__.py")
    }


def test_every_package_folder_is_listed() -> None:
    data_only = {".".join(("footplate", *DEMO_MODEL.parts))}
    assert set(setuptools_settings()["packages"]) - data_only == python_folders()


def test_every_folder_with_code_is_a_package() -> None:
    with_code = {path.parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert not [folder for folder in with_code if not (folder / "__init__.py").is_file()]


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy: a build writes into its source folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, source / layer, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--quiet", "--disable-pip-version-check", "-w", str(target), str(source)],
        check=True,
        timeout=60,
    )
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> set[str]:
    """The names in the wheel."""
    with zipfile.ZipFile(wheel_file) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_says_that_it_is_typed(wheel: set[str]) -> None:
    modules = {
        f"footplate/{path.relative_to(ROOT)}"
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*.py")
    }
    assert modules <= wheel
    assert {f"footplate/{layer}/py.typed" for layer in LAYERS} <= wheel


def test_the_wheel_holds_the_demo_model(wheel: set[str]) -> None:
    files = {path.name for path in (ROOT / DEMO_MODEL).iterdir() if path.is_file()}
    assert "config.json" in files
    assert {f"footplate/{DEMO_MODEL}/{name}" for name in files} <= wheel


def test_the_wheel_holds_the_sources_of_the_kernels(wheel: set[str]) -> None:
    folder = ROOT / "backend" / "kernels"
    sources = [path for path in folder.iterdir() if path.suffix in {".cpp", ".h"}]
    assert len(sources) > 3
    assert {f"footplate/backend/kernels/{path.name}" for path in sources} <= wheel


CLIENT_PROGRAM = """
import sys, footplate.frontend
from footplate.frontend import LLM, SamplingParams
assert footplate.frontend.__file__.startswith(sys.argv[1]), footplate.frontend.__file__
params = SamplingParams(max_tokens=8, seed=1, stop=["never seen"])
with LLM(model="fake") as llm:
    chat = [{"role": "user", "content": "Hello"}]
    outputs = llm.generate(["Hello", {"messages": chat}], params, use_tqdm=False)
assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
assert all(output.outputs[0].text for output in outputs)
"""


def test_the_installed_client_runs_without_torch_and_transformers(
    wheel_file: Path, tmp_path: Path
) -> None:
    installed, blocked = tmp_path / "installed", tmp_path / "blocked"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(installed), str(wheel_file)]
    subprocess.run(command, check=True, timeout=60)
    blocked.mkdir()
    # Python runs this at its start, in the client and in the engine core.
    (blocked / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
    )
    search_path = os.pathsep.join((str(blocked), str(installed)))
    done = subprocess.run(
        [sys.executable, "-c", CLIENT_PROGRAM, str(installed)],
        env={**os.environ, "PYTHONPATH": search_path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_installs_no_generic_name_for_the_whole_environment(wheel: set[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"footplate"}
    assert "footplate/__init__.py" not in wheel, "footplate is a namespace package"
    assert not [name for name in wheel if "/tests/" in name or name.endswith(".pyc")]
