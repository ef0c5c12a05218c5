"""Compiles the kernels for this machine on first use, and loads them.

The result is kept in a folder that only its owner can write to, under a name that hashes all
that went into it: sources, compiler flags, compiler version, what the CPU can do. Nothing else is
loaded from there. Import torch before loading: both use OpenMP, and the copy that is in the
process first serves both, so that there is one pool of threads.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 180.0
SCRATCH = "compiling-"  # begins the name of a folder beside the libraries

# -ffp-contract=off: a product and a sum become one rounding only where the source says so, or the
# same sum could round differently in two copies of one function. -fno-strict-aliasing: words are
# looked at as floats and as pairs of bf16.
COMMON_FLAGS = (
    *("-O2", "-std=c++17", "-w", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
)


class KernelBuildError(Exception):
    """Kernels cannot be compiled here. Its text is one line."""


class UnsafeFolderError(KernelBuildError):
    """Somebody else could have written to the cache folder."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What kernels can be compiled for.

    Attributes:
        requires: names of CPU features, as the operating system lists them.
        flags: for the compiler; explicit ones, so that a better CPU can compile and test this too.
        options: further compiler flags, each used when the CPU has the feature it is keyed by.
    """

    name: str
    requires: frozenset[str]
    flags: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)

    def compiler_flags(self, features: frozenset[str]) -> list[str]:
        """Flags for a CPU that has these features."""
        optional = [flag for feature, flag in self.options.items() if feature in features]
        return [*COMMON_FLAGS, *self.flags, *optional]


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")

# Fastest first.
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512_bf16",
        frozenset((*_AVX512, "avx512_bf16", "avx512_vnni")),
        (*(f"-m{name}" for name in _AVX512), "-mavx512bf16", "-mavx512vnni", "-mavx2", "-mfma"),
    ),
    InstructionSet(
        "avx512",
        frozenset(_AVX512),
        (*(f"-m{name}" for name in _AVX512), "-mavx2", "-mfma"),
        {"avx512_vnni": "-mavx512vnni"},
    ),
    InstructionSet(
        "avx2", frozenset(("avx2", "fma")), ("-mavx2", "-mfma"), {"avx_vnni": "-mavxvnni"}
    ),
    # Every 64-bit ARM has NEON.
    InstructionSet("neon", frozenset(("asimd",)), (), {"asimddp": "-march=armv8.2-a+dotprod"}),
)

# Runs everywhere, and slower than torch: what the others are compared with, never chosen.
PLAIN = InstructionSet("plain", frozenset(), ())


@functools.cache
def cpu_features() -> frozenset[str]:
    """Names of what this CPU can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(features.split())
    return frozenset(("asimd",)) if platform.machine() == "arm64" else frozenset()


def usable_instruction_sets() -> list[InstructionSet]:
    """Those that this CPU can run, fastest first."""
    return [isa for isa in INSTRUCTION_SETS if isa.requires <= cpu_features()]


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the kernels of this user belong, by the XDG base directory specification."""
    base = environment.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore relative paths.
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "footplate" / "kernels"


def load(
    folder: Path, compiler: str | None = None, instruction_set: InstructionSet | None = None
) -> ctypes.CDLL | None:
    """Load the kernels, after compiling them if they are not in `folder` yet.

    Args:
        folder: made when it is missing. When it cannot be used, kernels are compiled for this
            process alone.
        compiler: name or path; by default the first that is found of `COMPILERS`.
        instruction_set: by default the fastest of `INSTRUCTION_SETS` that this CPU can run.

    Returns:
        None, after one warning, when the kernels cannot be compiled or loaded.
    """
    try:
        if instruction_set is None:
            instruction_set = _best_instruction_set()
        build = Build.of(compiler, instruction_set)
        try:
            library = build.in_folder(folder)
        except (OSError, UnsafeFolderError) as error:
            logger.warning("kernels are compiled anew, %s cannot be used: %s", folder, error)
            with tempfile.TemporaryDirectory() as private:
                return ctypes.CDLL(str(build.in_folder(Path(private))))
        return ctypes.CDLL(str(library))
    except (OSError, KernelBuildError) as error:
        logger.warning("no CPU kernels, torch does the work, more slowly: %s", error)
        return None


def compile_ahead(folder: Path) -> None:
    """Compile what `load` will want, while torch is being imported. Quietly: `load` says what is
    wrong."""
    with contextlib.suppress(OSError, KernelBuildError):
        Build.of(None, _best_instruction_set()).in_folder(folder)


@dataclass(frozen=True, slots=True)
class Build:
    """One way to compile the kernels.

    Attributes:
        key: hash of all that the result depends on.
    """

    name: str
    command: Sequence[str]
    key: str

    @classmethod
    def of(cls, compiler: str | None, instruction_set: InstructionSet) -> "Build":
        """The build with this compiler, or the first one found.

        Raises:
            KernelBuildError: there is no compiler.
        """
        path = _find_compiler(compiler)
        flags = instruction_set.compiler_flags(cpu_features())
        digest = hashlib.sha256()
        for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        parts = (instruction_set.name, path, _version(path), *flags, *sorted(cpu_features()))
        digest.update("\0".join(parts).encode())
        command = (path, *flags, str(SOURCES / "kernels.cpp"))
        return cls(instruction_set.name, command, digest.hexdigest())

    def in_folder(self, folder: Path) -> Path:
        """The library in `folder`, compiled now unless it is there.

        Raises:
            UnsafeFolderError: others can write to the folder.
            KernelBuildError: the compiler failed.
            OSError: the folder cannot be written to.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        library = folder / f"{self.name}-{self.key[:32]}.so"
        if _is_intact(library):
            return library
        with _locked(folder / "lock"):
            # Another process may have compiled it while this one waited.
            if not _is_intact(library):
                for left_over in folder.glob(f"{SCRATCH}*"):  # by a process that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                self._compile(library)
        return library

    def _compile(self, library: Path) -> None:
        # Under another name until it is complete: a process that dies here leaves nothing that
        # looks like a library.
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=library.parent) as scratch:
            output, record = Path(scratch) / "library.so", Path(scratch) / "sha256"
            _run([*self.command, "-o", str(output)], COMPILE_TIMEOUT_S)
            output.chmod(0o600)
            record.write_text(_sha256(output))
            record.chmod(0o600)
            _record_of(library).unlink(missing_ok=True)
            output.replace(library)
            record.replace(_record_of(library))


def _best_instruction_set() -> InstructionSet:
    if usable := usable_instruction_sets():
        return usable[0]
    names = ", ".join(isa.name for isa in INSTRUCTION_SETS)
    raise KernelBuildError(f"this CPU has none of {names}")


def _find_compiler(compiler: str | None) -> str:
    for name in (compiler,) if compiler else COMPILERS:
        if path := shutil.which(name):
            return path
    raise KernelBuildError(f"no C++ compiler ({compiler or ', '.join(COMPILERS)} not found)")


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"], timeout_s=10)


# Runs a command, and kills its whole group of processes when standard input ends meanwhile.
_WITH_PARENT = """
exec 3<&0 0</dev/null
{ read -r nothing <&3; kill -KILL 0; } >/dev/null 2>&1 &
watcher=$!
"$@" 3<&-
status=$?
kill -KILL $watcher
wait $watcher 2>/dev/null
exit $status
"""


def _run(command: Sequence[str], timeout_s: float) -> str:
    """What a command prints. It and all that it starts end with this process, however that ends:
    a compiler is a driver that starts others, and none of them would notice."""
    reading, writing = os.pipe()  # nobody else has the end for writing
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _WITH_PARENT, "sh", *command],
            stdin=reading,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            start_new_session=True,  # a group of its own
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{command[0]}: {error}") from error
    finally:
        os.close(reading)
        os.close(writing)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        telling = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise KernelBuildError(f"{command[0]} failed with {done.returncode}: {telling[:300]}")
    return done.stdout


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafeFolderError("it is not a folder")
    if status.st_uid != os.geteuid():
        raise UnsafeFolderError(f"it belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise UnsafeFolderError(f"its mode is {mode:o}, and only its owner may have access")


def _is_intact(library: Path) -> bool:
    """Whether this is the file that was compiled, and nobody else could have written it."""
    try:
        for path in (library, _record_of(library)):
            status = path.lstat()
            mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
            if not stat.S_ISREG(status.st_mode) or not mine:
                return False
        return _sha256(library) == _record_of(library).read_text()
    except OSError:
        return False


def _record_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes; the system lets go of it when a process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
