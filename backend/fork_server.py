"""A process that has imported what an engine core needs, and makes cores of itself.

Importing torch is most of what it takes to start a core, and most of what a small one holds in
memory. Whoever forks has both for nothing: a core that takes another's place is there sooner by
the imports, and all cores of an engine have their pages in common. (Android's zygote does this
for the same two reasons.)

A fork copies one thread of a process, and whatever the others were in the middle of stays so for
ever. So nothing here starts a thread that goes on, and nothing touches a device; should a library
have started one nevertheless, cores are made by `python -m footplate.backend.main`.

Standard input is one of a pair of sockets (see `fork_link`). Its end is the end of this process,
and none of its children: they have a death line each.
"""

import gc
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from socket import socket
from typing import NoReturn

from footplate.backend import fail_points
from footplate.backend.address import is_free
from footplate.backend.core_files import CoreFiles
from footplate.backend.main import EX_SOFTWARE, run
from footplate.backend.runner.load import import_ahead
from footplate.protocol.config import WEIGHTS_FILE, CoreConfig
from footplate.protocol.fork_link import OWN_VARIABLES, Ended, Fork, Forked, ForkLink, Prepare

logger = logging.getLogger(__name__)

EX_OSERR = 71  # sysexits.h
THREAD_END_S = 1.0
# Above all that a child is given.
_FIRST_SPARE_FILE = 10


class ForkServer:
    """Owns the link to the client, and the children until they have ended.

    Args:
        link: its end is this process's end.
    """

    def __init__(self, link: ForkLink) -> None:
        self._link = link
        self._files: CoreFiles | None = None
        self._has_one_thread = _has_one_thread()
        self._children: dict[int, int] = {}  # process id to number
        self._bell = os.pipe()  # rung by SIGCHLD
        for end in self._bell:
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.set_wakeup_fd(self._bell[1], warn_on_full_buffer=False)

    def serve(self) -> None:
        """Do what is asked for, until the client is gone. Uses no CPU while nothing is."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        poll.register(self._bell[0], select.POLLIN)
        while True:
            for file, _ in poll.poll():
                if file == self._bell[0]:
                    with suppress(BlockingIOError):
                        os.read(file, 4096)
                    self._reap()
                else:
                    self._do_next()

    def _do_next(self) -> None:
        request, files = self._link.receive()
        match request:
            case Prepare(config=config):
                self._prepare(config)
            case Fork():
                self._fork(request, files)

    def leave_nothing(self) -> None:
        """The client is gone. Its folder is this process's to remove where no core is there that
        does so."""
        self._reap()
        if self._files is not None and not self._children:
            self._files.remove_all()

    def _prepare(self, config: CoreConfig) -> None:
        # A standby's are those of the core that serves.
        self._files = None if config.is_standby else CoreFiles(config)
        if not is_free(config.address):
            return  # the core is about to say so: it need not have torch for that
        with _watched(self._link, self.leave_nothing):
            import_ahead(config.model)
        self._has_one_thread = _has_one_thread()
        if not self._has_one_thread:
            logger.warning("imports have started threads: cores import for themselves")
        # Nothing of this will ever be garbage, and looking for some would write to its pages.
        gc.freeze()

    def _fork(self, request: Fork, files: list[int]) -> None:
        try:
            process_id = os.fork()
        except OSError as error:  # too many processes, or no memory for one
            logger.error("no engine core can be made: %s", error)
            _close(files)
            self._link.send(Ended(request.number, EX_OSERR))
            return
        if process_id == 0:
            try:
                self._become_core(request, files)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(EX_SOFTWARE)
        _close(files)
        self._children[process_id] = request.number
        handle = _open_process(process_id)
        self._link.send(Forked(request.number, process_id), handle)
        _close(handle)

    def _become_core(self, request: Fork, files: list[int]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        # Out of the way first: one may have the number that another is to get.
        spare = [fcntl(file, F_DUPFD_CLOEXEC, _FIRST_SPARE_FILE) for file in files]
        _close((*files, *self._bell))
        for file, number in zip(spare, (0, 1, WEIGHTS_FILE), strict=False):
            os.dup2(file, number)  # 0 was the link, whose object our callers hold
            os.close(file)
        for name in [name for name in os.environ if name.startswith(OWN_VARIABLES)]:
            del os.environ[name]
        os.environ.update(request.environment)
        if not self._has_one_thread:
            os.execv(sys.executable, [sys.executable, "-m", "footplate.backend.main"])
        with suppress(OSError):  # what `ps` and `top` show
            Path("/proc/self/comm").write_text("footplate-core")
        fail_points.read_environment()
        run(request.asked_at)

    def _reap(self) -> None:
        while self._children:
            process_id, status = os.waitpid(-1, os.WNOHANG)
            if process_id == 0:
                return
            number = self._children.pop(process_id, None)
            if number is not None:
                with suppress(OSError):  # nobody is left to be told
                    self._link.send(Ended(number, os.waitstatus_to_exitcode(status)))


def _has_one_thread() -> bool:
    """Whether a fork is a whole copy of this process; not known elsewhere than on Linux. One that
    has just been joined may take a moment to go."""
    deadline = time.monotonic() + THREAD_END_S
    try:
        while len(os.listdir("/proc/self/task")) > 1:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
    except OSError:
        return False
    return True


def _open_process(process_id: int) -> list[int]:
    """A descriptor of a child, which no later process can be mistaken for; none where there is no
    such thing."""
    with suppress(OSError, AttributeError):
        return [os.pidfd_open(process_id)]
    return []


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)


@contextmanager
def _watched(link: ForkLink, on_end: Callable[[], None]) -> Iterator[None]:
    """End this process with its link, whatever it is doing in the body. The thread that sees to
    that is gone afterwards.

    Args:
        on_end: called before, on that thread.
    """
    stop_reading, stop_writing = os.pipe()

    def watch() -> None:
        poll = select.poll()
        poll.register(link, 0)  # hanging up alone: requests may come meanwhile
        poll.register(stop_reading, 0)
        if any(file == link.fileno() for file, _ in poll.poll()):
            try:
                on_end()
            finally:
                os._exit(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        os.close(stop_writing)
        watcher.join()
        os.close(stop_reading)


def main() -> NoReturn:
    """Serve until the client is gone."""
    # A pool of threads that numpy would start as it is imported, for what no core computes with.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        link = ForkLink(socket(fileno=0))
    except OSError:
        sys.exit("footplate.backend is started by a supervisor: no socket on stdin")
    server = ForkServer(link)
    try:
        with suppress(EOFError, OSError):
            server.serve()
        server.leave_nothing()
    finally:
        os._exit(0)
