"""Real processes, what they leave behind, and waiting for them with a deadline."""

import asyncio
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from footplate.frontend import EngineArgs
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.shared_memory import SharedMemory
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import EngineStartError

HERE = Path(__file__).parent
PATIENCE_S = 30.0


def in_time(condition: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Whether a condition comes true before a deadline: for what tells nobody when it happens,
    such as a file that goes."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_gone(process_id: int) -> bool:
    """Whether a process has ended; a zombie has, and waits for its parent."""
    try:
        return bool(psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for sockets: of this user alone, and with a short name."""
    path = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@dataclass
class Program:
    """A process of a test, and the lines it has written."""

    process: subprocess.Popen[str]
    lines: "queue.Queue[str | None]" = field(default_factory=queue.Queue)
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def line_with(self, words: str) -> str:
        """The next line that holds these words; it is an error if the program ends before."""
        while (line := self.lines.get(timeout=PATIENCE_S)) is not None:
            self.seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"the program ended and never said {words!r}: {self.seen}")

    def rest(self) -> str:
        """All that it writes until its end."""
        lines = []
        while (line := self.lines.get(timeout=PATIENCE_S)) is not None:
            lines.append(line)
        return "".join(lines)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(PATIENCE_S)

    @property
    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture
def run() -> Iterator[Callable[..., Program]]:
    """Start programs; they are killed with the test."""
    programs: list[Program] = []

    def run(*arguments: str | Path) -> Program:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        programs.append(Program(process))
        return programs[-1]

    yield run
    for program in programs:
        program.process.kill()
        program.process.wait()
        program.reader.join(PATIENCE_S)


@dataclass
class Core:
    """A core process, as its supervisor sees it."""

    address: str
    folder: Path
    process: CoreProcess
    ends: "queue.Queue[EngineStartError]"
    gate: int
    config: CoreConfig
    standing_by: threading.Event = field(default_factory=threading.Event)

    def let_through(self, number: int = 1) -> None:
        """Let so many pass the gate of an obedient core."""
        os.write(self.gate, b"." * number)

    async def has_reached_gate(self) -> bool:
        """Whether it comes to its gate in time."""
        reached = self.folder.with_name(f"{self.folder.name}.gate.reached")
        return await asyncio.to_thread(in_time, reached.exists)

    def end(self) -> EngineStartError:
        """Why it has ended, once it has."""
        return self.ends.get(timeout=PATIENCE_S)

    def promote(self, **changes: Any) -> None:
        """Let a standby serve at its address."""
        self.process.promote(msgspec.structs.replace(self.config, is_standby=False, **changes))


StartCore = Callable[..., Core]


@pytest.fixture
def start_core(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartCore]:
    """Start core processes; with a mode, they obey (see `obedient_core`). The standby of another
    one is of the same address and folder."""
    cores: list[Core] = []

    def start(
        mode: str | None = None,
        *,
        standby_of: Core | None = None,
        is_standby: bool = False,
        shared: SharedMemory | None = None,
        **engine_args: Any,
    ) -> Core:
        number = len(cores)
        private = standby_of.folder if standby_of else folder / f"core{number}"
        private.mkdir(mode=0o700, exist_ok=True)
        fifo = folder / f"core{number}.gate"
        os.mkfifo(fifo)
        gate = os.open(fifo, os.O_RDWR)
        address = f"ipc://{private}/engine.sock"
        config = EngineArgs(**{"model": "fake", **engine_args}).core_config(address, str(private))
        is_standby = is_standby or standby_of is not None
        config = msgspec.structs.replace(config, is_standby=is_standby)
        ends: queue.Queue[EngineStartError] = queue.Queue()
        standing_by = threading.Event()
        with monkeypatch.context() as patch:
            if mode is not None:
                command = [sys.executable, HERE / "obedient_core.py", mode, fifo]
                program = folder / f"program{number}"
                program.write_text(f"#!/bin/sh\nexec {shlex.join(map(str, command))}\n")
                program.chmod(0o700)
                patch.setattr(sys, "executable", str(program))
            process = CoreProcess(config, ends.put, shared=shared, on_standing_by=standing_by.set)
        assert process.wait_for_birth(PATIENCE_S)
        cores.append(Core(address, private, process, ends, gate, config, standing_by))
        return cores[-1]

    yield start
    for core in cores:
        core.let_through(1000)
        core.process.stop()
        os.close(core.gate)
