"""Python imports a module of this name as it starts, in every process that finds this folder on its
path. It watches, from then on, whatever could make code of data or reach out of the process, and
writes what should not be to the file that AUDIT_LOG names: one line of JSON each."""

import importlib._bootstrap
import importlib._bootstrap_external
import json
import os
import sys
import zipimport
from types import CodeType, FrameType
from typing import Any

bootstrap: Any = importlib._bootstrap
bootstrap_external: Any = importlib._bootstrap_external

LOG = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

# By identity: a name can be claimed by anybody.
READS_PYC = {
    bootstrap_external._compile_bytecode.__code__,
    zipimport._unmarshal_code.__code__,  # type: ignore[attr-defined]
}
IMPORTS = {
    bootstrap._find_and_load.__code__,
    bootstrap._load_unlocked.__code__,
    bootstrap_external.SourceLoader.get_code.__code__,
}

# Code that is made while no import is under way, by the module that makes it.
MAKES_CODE = {
    "runpy": "python -m: the program itself",
    "jinja2.environment": "chat templates of the model folder, compiled for a sandbox",
}
STARTS_PROCESSES = ("subprocess.Popen", "os.posix_spawn", "os.fork")
WATCHED = {
    *STARTS_PROCESSES, "marshal.loads", "marshal.load", "pickle.find_class", "compile", "exec",
    "os.system", "os.exec", "os.spawn", "pty.spawn", "socket.bind",
}  # fmt: skip
PROCESSES = (
    "footplate.frontend.fork_server",
    "footplate.backend.fork_server",
    "footplate.backend.kernels.build",
)


def report(event: str, detail: object, frame: FrameType | None) -> None:
    where: list[str] = []
    while frame is not None and len(where) < 8:
        where.append(f"{frame.f_globals.get('__name__')}:{frame.f_lineno}")
        frame = frame.f_back
    line = {"process": os.getpid(), "event": event, "detail": str(detail)[:200], "where": where}
    os.write(LOG, json.dumps(line).encode() + b"\n")


def stack(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def is_importing(frames: list[FrameType]) -> bool:
    return any(frame.f_code in IMPORTS for frame in frames)


def modules(frames: list[FrameType]) -> set[str]:
    return {str(frame.f_globals.get("__name__")) for frame in frames}


def is_local(address: object) -> bool:
    if isinstance(address, str | bytes):
        return True  # a path
    return isinstance(address, tuple) and str(address[0]).startswith(("127.", "::1"))


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if event not in WATCHED:
        return
    caller = sys._getframe().f_back
    if caller is None:
        return  # the interpreter itself, as it starts the program
    if event in ("marshal.loads", "marshal.load"):
        if caller.f_code not in READS_PYC:
            report(event, "", caller)
    elif event in ("compile", "exec"):
        maker = str(caller.f_globals.get("__name__"))
        if not is_importing(stack(caller)) and maker not in MAKES_CODE:
            made = arguments[0]
            report(event, made.co_filename if isinstance(made, CodeType) else made, caller)
    elif event == "socket.bind":
        if not is_local(arguments[1]):
            report(event, arguments[1], caller)
    elif event in STARTS_PROCESSES and not modules(stack(caller)).isdisjoint(PROCESSES):
        return
    else:
        report(event, arguments, caller)


os.write(LOG, json.dumps({"process": os.getpid(), "event": "watched"}).encode() + b"\n")
sys.addaudithook(watch)
