"""The process that an engine's cores are forked from, as its client sees it.

Started by command: nothing of the client's own process is copied, no `__main__` guard is needed,
and it works in notebooks and under any event loop. That a core is a fork of another small process
is nothing to the client.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from socket import socketpair

from footplate.protocol.config import CoreConfig
from footplate.protocol.fork_link import (
    OWN_VARIABLES,
    Ended,
    Fork,
    Forked,
    ForkLink,
    Prepare,
)

# It exits within milliseconds of the end of its link.
STOP_TIMEOUT_S = 0.5
# Of a child's end it tells at once, if it is not stopped.
STATUS_TIMEOUT_S = 2.0


class Child:
    """A process that the fork server has made, or is about to make. Any thread may use it."""

    def __init__(self) -> None:
        self._process_id: int | None = None
        self._handle: int | None = None  # a pidfd
        self._exit_status: int | None = None
        self._is_orphan = False
        self._news = threading.Condition()

    @property
    def is_born(self) -> bool:
        """Whether there is such a process, or was."""
        return self._process_id is not None

    @property
    def exit_status(self) -> int | None:
        """Negative after a signal; None while it runs, or is still to be made."""
        return self._exit_status

    def wait_for_birth(self, timeout_s: float | None = None) -> int | None:
        """The process id, as soon as there is one; None if there is none in time, or ever."""
        with self._news:
            self._news.wait_for(lambda: self.is_born or self._exit_status is not None, timeout_s)
            return self._process_id

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it ends in time."""
        with self._news:
            return self._news.wait_for(lambda: self._exit_status is not None, timeout_s)

    def wait_for_status(self) -> int:
        """The exit status of one that is known to have ended, or to be about to."""
        with self._news:
            self._news.wait_for(
                lambda: self._exit_status is not None or self._is_orphan, STATUS_TIMEOUT_S
            )
        # When its parent is gone as well, somebody has ended both.
        self.end(-signal.SIGKILL)
        assert self._exit_status is not None
        return self._exit_status

    def send_signal(self, number: signal.Signals) -> None:
        """To the process, if it runs: never to another that has got its id since. One that is still
        to be made is not going to be."""
        with self._news:
            if self._exit_status is not None:
                return
            if self.is_born:
                self._send_signal(number)
                return
        self.end(-number)

    def _send_signal(self, number: signal.Signals) -> None:
        assert self._process_id is not None
        with suppress(ProcessLookupError):
            if self._handle is None:
                os.kill(self._process_id, number)
            else:
                signal.pidfd_send_signal(self._handle, number)

    def be_born(self, process_id: int, handle: int | None) -> None:
        """There it is. For its fork server.

        Args:
            handle: a pidfd, to be owned.
        """
        with self._news:
            self._process_id, self._handle = process_id, handle
            if self._exit_status is not None:  # nobody wants it any more
                self._send_signal(signal.SIGKILL)
                self._close()
            self._news.notify_all()

    def end(self, status: int) -> None:
        """It has ended, or will never be made. The first one to know says so."""
        with self._news:
            if self._exit_status is None:
                self._exit_status = status
                self._close()
            self._news.notify_all()

    def be_orphaned(self, status: int) -> None:
        """Its fork server is gone, with this status: nobody is going to tell its own."""
        if not self.is_born:
            self.end(status)
        with self._news:
            self._is_orphan = True
            self._news.notify_all()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class _Children:
    """Those that have not ended, by number. A thread that hears of them holds this, and not their
    fork server: that may be dropped."""

    def __init__(self) -> None:
        self._by_number: dict[int, Child] = {}
        self._last = 0
        self._mutex = threading.Lock()
        self.status_of_server: int | None = None
        self.has_had_one = False

    def add(self, child: Child) -> int:
        """Its number."""
        with self._mutex:
            self._last += 1
            self._by_number[self._last] = child
            if self.status_of_server is not None:
                child.be_orphaned(self.status_of_server)
            return self._last

    def hear(self, link: ForkLink, process: "subprocess.Popen[bytes]") -> None:
        """What the server says of them, until its end."""
        with suppress(EOFError, OSError):
            while True:
                answer, files = link.receive()
                match answer:
                    case Forked(number=number, process_id=process_id):
                        self._by_number[number].be_born(process_id, files[0] if files else None)
                        self.has_had_one = True
                    case Ended(number=number, status=status):
                        with self._mutex:
                            child = self._by_number.pop(number)
                        child.end(status)
        status = process.wait()
        with self._mutex:
            self.status_of_server = status
            for child in self._by_number.values():
                child.be_orphaned(status)


class ForkServer:
    """Owns the fork server's process. Any thread may use it.

    When this object is dropped, or this process ends in any way, the server ends too. Its children
    do not: each of them has a death line.
    """

    def __init__(self, config: CoreConfig) -> None:
        """Start it. It imports what cores will need, and then makes those that it was asked for.

        Args:
            config: of the first of them.

        Raises:
            OSError: the system has no room for another process.
        """
        ours, theirs = socketpair()
        with theirs:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-m", "footplate.backend"],
                stdin=theirs.fileno(),
                # A terminal's Ctrl-C goes to a whole process group; what it means is this
                # process's decision.
                start_new_session=True,
            )
        self._link = ForkLink(ours)
        self._children = _Children()
        self._sending = threading.Lock()
        with suppress(OSError):  # it is gone already: so will be what it is asked for
            self._link.send(Prepare(config))
        listener = threading.Thread(
            target=self._children.hear,
            args=(self._link, self._process),
            name="fork server",
            daemon=True,
        )
        listener.start()
        self._finalizer = weakref.finalize(
            self, _stop, self._link, self._process, listener, os.getpid()
        )

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked for more."""
        return self._children.status_of_server is None

    @property
    def is_ready(self) -> bool:
        """Whether it has made one before: then the next is there within milliseconds."""
        return self._children.has_had_one

    def fork(self, files: Sequence[int]) -> Child:
        """Have a core made: at once, or when what it needs has been imported.

        Args:
            files: descriptors that become its 0, 1 and `WEIGHTS_FILE`. They stay the caller's.
        """
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(OWN_VARIABLES)
        }
        child = Child()
        request = Fork(self._children.add(child), environment, time.monotonic())
        with self._sending, suppress(OSError):  # it is gone: whoever hears of that tells the child
            self._link.send(request, files)
        return child

    def kill(self) -> None:
        """End it the hard way: it tidies nothing up, and another takes its place."""
        self._process.kill()
        self.stop()

    def stop(self) -> None:
        """End it and wait until it is gone. May be called more than once."""
        self._finalizer()


def _stop(
    link: ForkLink, process: "subprocess.Popen[bytes]", listener: threading.Thread, owner: int
) -> None:
    if os.getpid() != owner:
        return  # in a fork of its owner, at whose end finalizers run as well
    link.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if listener is not threading.current_thread():  # which may have dropped the last reference
        listener.join()
