"""Work that must not slow down another process: a standby loads while a core serves."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

# A tenth of what others get. At 15, a thirtieth, a standby of a small model was not ready within
# five minutes on a machine with four times as much to do as it has cores.
NICENESS = 10

# Linux may share the CPU out between sessions first, and every core is a session of its own.
_SESSION = Path("/proc/self/autogroup")
MAX_TRIES = 10
_THREADS = Path("/proc/self/task")

T = TypeVar("T")


class Background:
    """Calls something at a low priority, until that is over."""

    def __init__(self) -> None:
        self._is_over = False
        self._niceness = os.getpriority(os.PRIO_PROCESS, 0)
        # Who begins and who ends are different threads.
        self._mutex = threading.Lock()

    def call(self, call: Callable[[], T]) -> T:
        """Call on a thread of its own, and wait.

        A thread has its own priority, which those that it starts inherit; and where only a
        privileged process may take back what it has given up, this one's others have kept theirs.

        Raises:
            Exception: whatever `call` raises.
        """
        result: Future[T] = Future()

        def run() -> None:
            self._begin()
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="background", daemon=True).start()
        return result.result()

    def _begin(self) -> None:
        with self._mutex, suppress(OSError):  # not permitted: then it is as fast as others
            if not self._is_over:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
                _set_niceness_of_session(NICENESS)

    def end(self) -> None:
        """From now on this process is as important as others. A call that is under way gets as
        much of that as the system allows."""
        with self._mutex:
            self._is_over = True
            with suppress(OSError):
                _set_niceness_of_session(0)
            with suppress(OSError):
                for thread in os.listdir(_THREADS):
                    os.setpriority(os.PRIO_PROCESS, int(thread), self._niceness)


def _set_niceness_of_session(niceness: int) -> None:
    if os.getsid(0) != os.getpid():
        return  # others are in it
    for _ in range(MAX_TRIES):
        with suppress(BlockingIOError):  # Linux allows this ten times a second, to all together
            _SESSION.write_text(str(niceness))
            return
        time.sleep(0.1)
