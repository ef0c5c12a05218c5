"""Starts an engine core as a child process, notices its end, ends it.

The child is started by command, never by fork: nothing of this process is copied, no `__main__`
guard is needed, and it works in notebooks and under any event loop.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO

import msgspec

from footplate.frontend.shared_memory import SharedMemory
from footplate.protocol.codec import BadFrameError, core_message_decoder
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import AddressInUseError, EngineStartError
from footplate.protocol.messages import STANDING_BY, CoreMessage, Progress, Refused

# A core exits within milliseconds of the end of its death line; one that does not is hung, and the
# event loop waits with us.
STOP_TIMEOUT_S = 0.5
# One that is asked to end finishes its step, and tells its clients.
TERMINATE_TIMEOUT_S = 5.0


class CoreProcess:
    """One engine-core process. Owns the child and its death line.

    When this object is dropped, or this process ends in any way, the child ends too: it sees the
    end of its standard input.
    """

    def __init__(
        self,
        config: CoreConfig,
        on_exit: Callable[[EngineStartError], object],
        *,
        shared: SharedMemory | None = None,
        on_standing_by: Callable[[], object] = lambda: None,
    ) -> None:
        """Start the child.

        Args:
            config: with `is_standby`, of a core that loads and waits until it is promoted.
            on_exit: called once, from a thread of its own, when the child has ended without
                `stop`; the error says why, as far as that can be known.
            shared: where cores of one model keep what they can share.
            on_standing_by: called once, from that thread, when a standby has loaded all it can.
        """
        self._stopping = threading.Event()
        self._standing_by = threading.Event()
        file = None if shared is None else shared.file
        self._child = subprocess.Popen(
            [sys.executable, "-m", "footplate.backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal's Ctrl-C goes to a whole process group; what it means for the core is
            # this process's decision.
            start_new_session=True,
            pass_fds=() if file is None else (file,),
        )
        self._send(msgspec.structs.replace(config, weights_file=file))
        threading.Thread(
            target=_wait_for_end,
            args=(self._child, self._stopping, on_exit, self._standing_by, on_standing_by),
            name="core watcher",
            daemon=True,
        ).start()
        self._finalizer = weakref.finalize(self, _stop, self._child, self._stopping, os.getpid())

    @property
    def process_id(self) -> int:
        """The child's pid."""
        return self._child.pid

    @property
    def exit_status(self) -> int | None:
        """The child's exit status; None while it runs."""
        return self._child.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child, if it still runs."""
        self._child.send_signal(number)

    def kill(self) -> None:
        """End the child the hard way and wait until it is gone; `on_exit` is not called."""
        self._stopping.set()
        self._child.kill()
        self._child.wait()

    def terminate(self) -> None:
        """Ask the child to end, and wait a little for it; `on_exit` is not called."""
        self._stopping.set()
        self._child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(TERMINATE_TIMEOUT_S)

    @property
    def is_standing_by(self) -> bool:
        """Whether it is a standby that has loaded all it can."""
        return self._standing_by.is_set()

    def promote(self, config: CoreConfig) -> None:
        """Let a standby serve, as `config` says, which names the same model. Call it once, when the
        core before it is gone. One that is still loading serves when it is done; one that has
        ended has told `on_exit`."""
        assert not config.is_standby
        self._send(config)

    def stop(self) -> None:
        """End the child and wait until it is gone. May be called more than once."""
        self._finalizer()

    def _send(self, config: CoreConfig) -> None:
        assert self._child.stdin is not None
        packed = msgspec.msgpack.encode(config)
        with suppress(BrokenPipeError):  # it is gone already; on_exit says why
            self._child.stdin.write(struct.pack("<I", len(packed)) + packed)
            self._child.stdin.flush()


def _stop(child: "subprocess.Popen[bytes]", stopping: threading.Event, owner: int) -> None:
    if os.getpid() != owner:
        return  # in a fork of its owner, at whose end finalizers run as well
    stopping.set()
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _wait_for_end(
    child: "subprocess.Popen[bytes]",
    stopping: threading.Event,
    on_exit: Callable[[EngineStartError], object],
    standing_by: threading.Event,
    on_standing_by: Callable[[], object],
) -> None:
    assert child.stdout is not None
    last_words: CoreMessage | None = None
    with child.stdout:
        for message in _messages(child.stdout):  # ends when the child does
            last_words = message
            if message == Progress(STANDING_BY, 1.0):
                standing_by.set()
                on_standing_by()
    status = child.wait()
    if not stopping.is_set():
        on_exit(_explain_end(status, last_words))


def _messages(pipe: IO[bytes]) -> Iterator[CoreMessage]:
    """Messages of the child, each behind its length. What makes no sense ends them."""
    decode = core_message_decoder().decode
    with suppress(BadFrameError, struct.error):
        while True:
            (size,) = struct.unpack("<I", pipe.read(4))
            yield decode(pipe.read(size))


def _explain_end(status: int, last_words: CoreMessage | None) -> EngineStartError:
    if isinstance(last_words, Refused):
        kind = AddressInUseError if last_words.kind == "address" else EngineStartError
        return kind(last_words.reason)
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps because the machine ran out of memory" if name == "SIGKILL" else ""
        return EngineStartError(f"the engine core was killed by {name}{hint}")
    return EngineStartError(f"the engine core ended with exit status {status}; see its log")
