"""Compiling on first use: one build for many processes, nothing foreign loaded, no compiler."""

import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from footplate.backend.kernels import build
from footplate.backend.kernels.build import (
    INSTRUCTION_SETS,
    PLAIN,
    Build,
    KernelBuildError,
    UnsafeFolderError,
    cache_folder,
    load,
    usable_instruction_sets,
)
from footplate.backend.kernels.linear import PackedLinear, Quantization
from footplate.backend.kernels.ops import Kernels


class FakeCompiler:
    """A script that logs its calls and hands out a library compiled before."""

    def __init__(self, folder: Path, library: Path, seconds: float = 0.0) -> None:
        self.path = folder / "fake-c++"
        self._log = folder / "calls"
        self._log.touch()
        self.path.write_text(
            f"""#!/bin/sh
            [ "$1" = --version ] && {{ echo "fake c++ 1.0"; exit 0; }}
            echo compiled >> {self._log}
            sleep {seconds}
            while [ "$1" != -o ]; do shift; done
            cp {library} "$2"
            """
        )
        self.path.chmod(0o755)

    @property
    def num_calls(self) -> int:
        return len(self._log.read_text().splitlines())


def compiling(compiler: Path, folder: Path) -> str:
    """A program that compiles and prints where the library is."""
    # By its path: the package would import torch, for seconds.
    return f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("build", {str(build.__file__)!r})
module = importlib.util.module_from_spec(spec)
sys.modules["build"] = module
spec.loader.exec_module(module)
from pathlib import Path
print(module.Build.of({str(compiler)!r}, module.PLAIN).in_folder(Path({str(folder)!r})))
"""


@pytest.fixture(scope="session")
def library(kernel_folder: Path) -> Path:
    """A library that was compiled for this machine."""
    return Build.of(None, usable_instruction_sets()[0]).in_folder(kernel_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, library: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path, library)


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_the_second_start_compiles_nothing_and_is_quick(
    folder: Path, compiler: FakeCompiler
) -> None:
    assert load(folder, str(compiler.path)) is not None
    durations = []
    for _ in range(5):
        build._version.cache_clear()
        start = time.perf_counter()
        assert load(folder, str(compiler.path)) is not None
        durations.append(time.perf_counter() - start)
    assert compiler.num_calls == 1
    assert min(durations) < 0.05


def test_the_folder_is_private(folder: Path, compiler: FakeCompiler) -> None:
    assert load(folder, str(compiler.path)) is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_two_processes_that_start_together_compile_once(
    tmp_path: Path, folder: Path, library: Path
) -> None:
    compiler = FakeCompiler(tmp_path, library, seconds=0.3)
    program = compiling(compiler.path, folder)
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=30)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert compiler.num_calls == 1
    (output,) = outputs
    assert Path(output).read_bytes() == library.read_bytes()


def test_what_is_compiled_depends_on_the_instruction_set(compiler: FakeCompiler) -> None:
    keys = {Build.of(str(compiler.path), isa).key for isa in (*INSTRUCTION_SETS, PLAIN)}
    assert len(keys) == len(INSTRUCTION_SETS) + 1


@pytest.mark.parametrize("damage", ["changed", "writable", "link", "no record"])
def test_a_library_that_may_be_foreign_is_not_loaded(
    tmp_path: Path, folder: Path, library: Path, compiler: FakeCompiler, damage: str
) -> None:
    a_build = Build.of(str(compiler.path), usable_instruction_sets()[0])
    built = a_build.in_folder(folder)
    if damage == "changed":
        built.write_bytes(built.read_bytes() + b"x")
    elif damage == "writable":
        built.chmod(0o666)
    elif damage == "link":
        foreign = tmp_path / "foreign.so"
        shutil.copy(built, foreign)
        built.unlink()
        built.symlink_to(foreign)
    else:
        built.with_suffix(".sha256").unlink()
    again = a_build.in_folder(folder)
    assert compiler.num_calls == 2
    assert again.read_bytes() == library.read_bytes()
    assert again.is_file() and not again.is_symlink()
    assert stat.S_IMODE(again.stat().st_mode) == 0o600


def test_a_build_that_was_cut_off_leaves_nothing_behind(
    tmp_path: Path, folder: Path, library: Path
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\nkill -9 $$\n")
    broken.chmod(0o755)
    with pytest.raises(KernelBuildError):
        Build.of(str(broken), PLAIN).in_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_folder_others_can_write_to_is_not_used(
    folder: Path, compiler: FakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    with pytest.raises(UnsafeFolderError, match="mode is 755"):
        Build.of(str(compiler.path), PLAIN).in_folder(folder)
    # The kernels are there all the same, compiled for this process alone.
    assert load(folder, str(compiler.path)) is not None
    assert "mode is 755" in only_warning(caplog)
    assert not list(folder.iterdir())


def test_a_link_to_a_folder_is_not_used(
    tmp_path: Path, folder: Path, compiler: FakeCompiler
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(UnsafeFolderError):
        Build.of(str(compiler.path), PLAIN).in_folder(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_somebody_elses_folder_is_not_used(folder: Path, compiler: FakeCompiler) -> None:
    folder.mkdir(mode=0o700, parents=True)
    os.chown(folder, 12345, 12345)
    with pytest.raises(UnsafeFolderError, match="belongs to user 12345"):
        Build.of(str(compiler.path), PLAIN).in_folder(folder)


def test_without_a_compiler_there_is_one_warning_and_nothing_else(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load(folder) is None
    assert "no C++ compiler (c++, g++, clang++ not found)" in only_warning(caplog)


def test_a_compiler_that_fails_is_quoted_in_one_line(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = tmp_path / "failing-c++"
    failing.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\n"
        "echo 'In file included from x:' >&2\necho 'x.h:1: error: no such thing' >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    assert load(folder, str(failing)) is None
    assert "x.h:1: error: no such thing" in only_warning(caplog)


def test_a_compiler_that_makes_nonsense_is_survived(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"not a library")
    assert load(folder, str(FakeCompiler(tmp_path, nonsense).path)) is None
    only_warning(caplog)


def test_a_cpu_that_is_not_known_gets_no_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"mmx"}))
    assert load(folder) is None
    assert "this CPU has none of avx512_bf16, avx512, avx2, neon" in only_warning(caplog)


def test_the_cache_folder_follows_the_xdg_specification() -> None:
    expected = Path("/somewhere/footplate/kernels")
    assert cache_folder({"XDG_CACHE_HOME": "/somewhere"}) == expected
    default = Path.home() / ".cache" / "footplate" / "kernels"
    assert cache_folder({}) == cache_folder({"XDG_CACHE_HOME": "relative"}) == default


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is loaded")
def test_kernels_share_the_threads_of_torch(kernels: Kernels) -> None:
    torch.ones(8).sum()
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line}
    assert len(pools) == 1


def test_a_cpu_without_optional_features_computes_the_same(kernel_folder: Path) -> None:
    # Without its 8-bit dot product an instruction set takes another path in the source.
    weight, x = torch.randn(64, 300), torch.randn(5, 300)
    for isa in usable_instruction_sets():
        if isa.options:
            bare = build.InstructionSet(isa.name, isa.requires, isa.flags)
            results = []
            for variant in (isa, bare):
                library = load(kernel_folder, instruction_set=variant)
                assert library is not None
                kernels = Kernels(library)
                formats: tuple[Quantization, ...] = ("int8", "int4")
                results.append([PackedLinear(kernels, weight, quantization=q)(x) for q in formats])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sources_are_part_of_the_package() -> None:
    spec = importlib.util.find_spec("footplate.backend.kernels")
    assert spec is not None and spec.submodule_search_locations is not None
    names = {path.suffix for path in Path(next(iter(spec.submodule_search_locations))).iterdir()}
    assert {".cpp", ".h"} <= names


def test_a_compiler_and_what_it_has_started_end_with_a_killed_process(
    tmp_path: Path, folder: Path
) -> None:
    started, compiler = tmp_path / "started", tmp_path / "driver"
    # As real ones: a driver that waits for a process which does the work.
    compiler.write_text(
        f"""#!/bin/sh
        [ "$1" = --version ] && {{ echo "driver 1.0"; exit 0; }}
        sleep 600 & echo $$ $! > {started}.part && mv {started}.part {started}
        wait
        """
    )
    compiler.chmod(0o755)
    process = subprocess.Popen([sys.executable, "-c", compiling(compiler, folder)])
    deadline = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    driver, worker = map(psutil.Process, map(int, started.read_text().split()))
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([driver, worker], timeout=2)
    assert not alive
    # What was half made goes with the next build, here one that fails.
    assert list(folder.glob("compiling-*"))
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo driver 1.0\n')
    with pytest.raises(KernelBuildError):
        Build.of(str(compiler), PLAIN).in_folder(folder)
    assert not list(folder.glob("compiling-*"))


def test_a_compilers_exit_status_and_words_come_through(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(KernelBuildError, match="failed with 3: error: no such thing"):
        Build.of(str(compiler), INSTRUCTION_SETS[0])
