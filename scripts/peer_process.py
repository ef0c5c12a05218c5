"""Runs a peer: one process for one job, of which nothing is left afterwards."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from footplate.frontend.benchmark.summary import RequestRecord
from footplate.frontend.benchmark.workload import WorkItem
from peer import Job, Result, Work

SCRIPTS = Path(__file__).resolve().parent
_SHOWN_LINES = 20


class PeerError(Exception):
    """A peer did not do its job.

    Attributes:
        log: the end of what it wrote.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def peer_command(name: str, python: str = sys.executable) -> list[str]:
    """The program of scripts/<name>_peer.py, under the Python of an environment."""
    return [python, str(SCRIPTS / f"{name}_peer.py")]


def require_package(python: Path, package: str, install: str) -> None:
    """Make sure that an environment has a package, without importing it.

    Raises:
        ValueError: it has not, or there is no such environment.
    """
    look = f"import importlib.util as u, sys; sys.exit(not u.find_spec({package!r}))"
    try:
        done = subprocess.run([python, "-c", look], env=_environment(str(python)))
    except OSError as error:
        raise ValueError(f"{python} is no Python: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"{python} has no {package}: {python} -m pip install {install}")


def work_of(items: Sequence[WorkItem]) -> Work:
    """A benchmark's work as a peer gets it."""
    return Work([item.prompt_token_ids for item in items], [item.max_tokens for item in items])


def records_of(work: Work, result: Result) -> list[RequestRecord]:
    """A peer's outputs as a benchmark's records: all requests were sent at the start, 0."""
    return [
        RequestRecord(len(prompt), token_ids=output.token_ids, moments=output.moments)
        for prompt, output in zip(work.prompts, result.outputs, strict=True)
    ]


def run_peer(command: list[str], job: Job, timeout_s: float | None = None) -> Result:
    """Do one job with one peer.

    Raises:
        PeerError: it failed, took too long, or did other work than it was asked to.
    """
    with tempfile.TemporaryFile() as log:
        answer = _run(command, job, timeout_s, log)
        try:
            result = msgspec.json.decode(answer, type=Result)
        except msgspec.DecodeError as error:
            raise PeerError(f"its answer is no result: {error}", _tail(log)) from None
    lengths = [len(output.token_ids) for output in result.outputs]
    wrong = sum(length != n for length, n in zip(lengths, job.work.max_tokens, strict=True))
    if wrong:
        raise PeerError(f"{wrong} of {len(lengths)} outputs are not as long as they had to be")
    return result


def _run(command: list[str], job: Job, timeout_s: float | None, log: IO[bytes]) -> bytes:
    job = dataclasses.replace(job, started_at=time.time())
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=_environment(command[0]),
        start_new_session=True,
    ) as process:
        try:
            answer, _ = process.communicate(msgspec.json.encode(job), timeout_s)
        except subprocess.TimeoutExpired:
            raise PeerError(f"not done after {timeout_s:g} s", _tail(log)) from None
        finally:
            # Whatever it started must not run during the next one's turn.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        text = _tail(log)
        raise PeerError(text.rpartition("\n")[2] or f"exit status {process.returncode}", text)
    return answer


def _environment(python: str) -> dict[str, str]:
    """For a Python of another environment, without what PYTHONPATH adds to this one."""
    kept = python == sys.executable
    return {name: value for name, value in os.environ.items() if kept or name != "PYTHONPATH"}


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").rstrip().splitlines()
    return "\n".join(lines[-_SHOWN_LINES:])
