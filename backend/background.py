"""Work that must not slow down another process: a standby loads while a core serves."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

# The politest there is short of starving on a machine that is never idle.
NICENESS = 19

# Linux may share the CPU out between sessions first, and every core is a session of its own.
_SESSION = Path("/proc/self/autogroup")

T = TypeVar("T")


def call_in_background(call: Callable[[], T]) -> T:
    """Call on a thread of the lowest priority, whose own threads inherit it, and wait.

    A thread, because only a privileged process could take back what it has given up: this one's
    other threads keep their priority, and the threads of a pool end with the thread they worked
    for.

    Raises:
        Exception: whatever `call` raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        with suppress(OSError):  # not permitted here: then it is as fast as others
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    _be_nice_as_a_session(NICENESS)
    threading.Thread(target=run, name="loading", daemon=True).start()
    return result.result()


def end_background() -> None:
    """From now on this process is as important as others."""
    _be_nice_as_a_session(0)


def _be_nice_as_a_session(niceness: int) -> None:
    with suppress(OSError):  # a kernel without such groups, or none of our own
        _SESSION.write_text(str(niceness))
