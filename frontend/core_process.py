"""Starts an engine core as a process of its own, notices its end, ends it."""

import os
import signal
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO

import msgspec

from footplate.frontend.fork_server import Child, ForkServer
from footplate.frontend.shared_memory import SharedMemory
from footplate.protocol.codec import BadFrameError, core_message_decoder
from footplate.protocol.config import WEIGHTS_FILE, CoreConfig
from footplate.protocol.errors import AddressInUseError, EngineStartError
from footplate.protocol.messages import STANDING_BY, CoreMessage, Progress, Refused

# A core exits within milliseconds of the end of its death line; one that does not is hung, and the
# event loop waits with us.
STOP_TIMEOUT_S = 0.5
# One that is asked to end finishes its step, and tells its clients, for ten seconds if they read.
TERMINATE_TIMEOUT_S = 12.0


class CoreProcess:
    """One engine-core process. Owns the process and its death line.

    When this object is dropped, or this process ends in any way, the core ends too: it sees the
    end of its standard input.
    """

    def __init__(
        self,
        config: CoreConfig,
        on_exit: Callable[[EngineStartError], object],
        *,
        fork_server: ForkServer | None = None,
        shared: SharedMemory | None = None,
        on_standing_by: Callable[[], object] = lambda: None,
    ) -> None:
        """Start the core.

        Args:
            config: with `is_standby`, of a core that loads and waits until it is promoted.
            on_exit: called once, from a thread of its own, when the core has ended without
                `stop`; the error says why, as far as that can be known.
            fork_server: makes the process; None starts one for this core alone.
            shared: where cores of one model keep what they can share.
            on_standing_by: called once, from that thread, when a standby has loaded all it can.

        Raises:
            OSError: the system has no room for more processes or pipes.
        """
        self._stopping = threading.Event()
        self._standing_by = threading.Event()
        self._own_server = ForkServer(config) if fork_server is None else None
        server = fork_server or self._own_server
        assert server is not None
        memory = None if shared is None else shared.file
        orders, self._orders = _pipe()
        answers, told = _pipe()
        with orders, told:
            files = [orders.fileno(), told.fileno(), *([] if memory is None else [memory])]
            self._child = server.fork(files)
        self._send(
            msgspec.structs.replace(config, weights_file=None if memory is None else WEIGHTS_FILE)
        )
        threading.Thread(
            target=_wait_for_end,
            args=(
                self._child,
                answers,
                self._stopping,
                on_exit,
                self._standing_by,
                on_standing_by,
            ),
            name="core watcher",
            daemon=True,
        ).start()
        self._finalizer = weakref.finalize(
            self, _stop, self._child, self._orders, self._stopping, self._own_server, os.getpid()
        )

    @property
    def process_id(self) -> int:
        """The core's pid; waits for it while the fork server still imports.

        Raises:
            ProcessLookupError: there has never been one.
        """
        process_id = self.wait_for_birth()
        if process_id is None:
            raise ProcessLookupError("the core ended before there was a process of it")
        return process_id

    def wait_for_birth(self, timeout_s: float | None = None) -> int | None:
        """The core's pid, as soon as it has one; None if it has none in time, or ever."""
        return self._child.wait_for_birth(timeout_s)

    @property
    def exit_status(self) -> int | None:
        """The core's exit status; None while it runs."""
        return self._child.exit_status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the core, if it still runs."""
        self._child.send_signal(number)

    def kill(self) -> None:
        """End the core the hard way and wait until it is gone; `on_exit` is not called."""
        self._stopping.set()
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()

    def terminate(self) -> None:
        """Ask the core to end, and wait a little for it; `on_exit` is not called."""
        self._stopping.set()
        self._child.send_signal(signal.SIGTERM)
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
        """End the core and wait until it is gone. May be called more than once."""
        self._finalizer()

    def _send(self, config: CoreConfig) -> None:
        packed = msgspec.msgpack.encode(config)
        with suppress(BrokenPipeError):  # it is gone already; on_exit says why
            self._orders.write(struct.pack("<I", len(packed)) + packed)
            self._orders.flush()


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb"), os.fdopen(writing, "wb")


def _stop(
    child: Child,
    orders: IO[bytes],
    stopping: threading.Event,
    own_server: ForkServer | None,
    owner: int,
) -> None:
    if os.getpid() != owner:
        return  # in a fork of its owner, at whose end finalizers run as well
    stopping.set()
    with suppress(BrokenPipeError):
        orders.close()
    if not child.is_born or not child.wait(STOP_TIMEOUT_S):
        child.send_signal(signal.SIGKILL)
        child.wait()
    if own_server is not None:
        own_server.stop()


def _wait_for_end(
    child: Child,
    answers: IO[bytes],
    stopping: threading.Event,
    on_exit: Callable[[EngineStartError], object],
    standing_by: threading.Event,
    on_standing_by: Callable[[], object],
) -> None:
    last_words: CoreMessage | None = None
    with answers:
        for message in _messages(answers):
            last_words = message
            if message == Progress(STANDING_BY, 1.0):
                standing_by.set()
                on_standing_by()
        while answers.read(4096):
            pass  # what makes no sense; its end is the process's
    status = child.wait_for_status()
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
