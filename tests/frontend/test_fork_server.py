"""What a client knows of a process that another has made for it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from footplate.frontend import fork_server
from footplate.frontend.fork_server import Child

Process = subprocess.Popen[bytes]


@pytest.fixture
def process() -> Iterator[Process]:
    """One that waits until it is ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def handle_of(process: Process) -> int | None:
    return os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None


def test_one_that_is_still_to_be_made_has_neither_id_nor_status() -> None:
    child = Child()
    assert not child.is_born
    assert child.wait_for_birth(0) is None
    assert child.exit_status is None
    assert not child.wait(0)


def test_whoever_waits_for_its_id_gets_it(process: Process) -> None:
    child = Child()
    ids: list[int | None] = []
    waiting = threading.Thread(target=lambda: ids.append(child.wait_for_birth()))
    waiting.start()
    child.be_born(process.pid, None)
    waiting.join()
    assert ids == [process.pid]


@pytest.mark.parametrize("has_handle", [True, False])
def test_a_signal_reaches_it(process: Process, has_handle: bool) -> None:
    child = Child()
    child.be_born(process.pid, handle_of(process) if has_handle else None)
    child.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("has_handle", [True, False])
def test_a_signal_to_one_that_has_ended_reaches_nobody(process: Process, has_handle: bool) -> None:
    child = Child()
    child.be_born(process.pid, handle_of(process) if has_handle else None)
    child.end(0)  # from now on another process may have its id, such as this one
    child.send_signal(signal.SIGKILL)
    assert process.poll() is None


def test_one_that_is_ended_before_it_is_made_counts_as_ended_and_is_killed_when_it_is_made(
    process: Process,
) -> None:
    child = Child()
    child.send_signal(signal.SIGKILL)
    assert child.exit_status == -signal.SIGKILL
    assert child.wait_for_birth() is None
    child.be_born(process.pid, handle_of(process))
    assert process.wait() == -signal.SIGKILL


def test_the_first_word_of_its_end_counts(process: Process) -> None:
    child = Child()
    child.be_born(process.pid, None)
    child.end(3)
    child.end(-9)
    assert child.wait_for_status() == 3


def test_one_whose_server_went_before_it_was_made_ended_with_it() -> None:
    child = Child()
    child.be_orphaned(-signal.SIGSEGV)
    assert child.wait_for_status() == -signal.SIGSEGV


def test_an_orphan_lives_until_its_end_is_seen_and_then_counts_as_killed(process: Process) -> None:
    child = Child()
    child.be_born(process.pid, None)
    child.be_orphaned(0)
    assert child.exit_status is None
    assert child.wait_for_status() == -signal.SIGKILL


def test_a_status_that_nobody_tells_is_not_waited_for_for_ever(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "STATUS_TIMEOUT_S", 0.01)
    child = Child()
    child.be_born(process.pid, None)
    assert child.wait_for_status() == -signal.SIGKILL
