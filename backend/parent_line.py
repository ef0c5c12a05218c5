"""What the parent says to this process through its standard input, and that it is gone.

Both ways, a message is its length (four bytes, little endian) and msgpack. The parent sends a
`CoreConfig`, and to a standby a second one, when it is wanted. The end of the pipe is the **death
line**: whatever this process is doing then, it ends.
"""

import os
import queue
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from footplate.backend.core_files import CoreFiles
from footplate.protocol.codec import Encoder
from footplate.protocol.config import CoreConfig
from footplate.protocol.messages import Message
from footplate.protocol.pipes import read_exactly


class ParentLine:
    """Owns the pipes from and to the parent.

    Args:
        pipe: a file descriptor to read from; its end is the death line.
        answers: a file descriptor for what this process says of itself.
        on_promotion: called when a second message has come, on the thread that watches.
    """

    def __init__(self, pipe: int, answers: int, on_promotion: Callable[[], object]) -> None:
        self._pipe = pipe
        self._answers = answers
        self._on_promotion = on_promotion
        self._promotions: queue.SimpleQueue[CoreConfig | str] = queue.SimpleQueue()
        self._files: CoreFiles | None = None

    def read_config(self) -> CoreConfig:
        """The first message, which every process is sent.

        Raises:
            SystemExit: there is none. The parent's end at this moment is this process's end.
        """
        try:
            return self._read()
        except (EOFError, OSError):
            sys.exit("an engine core is started by a supervisor: no configuration on stdin")
        except msgspec.MsgspecError as error:
            sys.exit(f"the configuration on stdin makes no sense: {error}")

    def watch(self) -> None:
        """Follow the line on a thread of its own from now on, and end with it."""
        threading.Thread(target=self._watch, name="death line", daemon=True).start()

    @property
    def files(self) -> CoreFiles:
        """Of the core that the parent wants to serve; removed when the parent is gone, from the
        moment on at which it said so."""
        assert self._files is not None, "a standby owns no files"
        return self._files

    def wait_for_promotion(self) -> CoreConfig:
        """The second message; one that has come already is there at once. Uses no CPU.

        Raises:
            ValueError: it makes no sense.
        """
        promotion = self._promotions.get()
        if isinstance(promotion, str):
            raise ValueError(f"the promotion on stdin makes no sense: {promotion}")
        return promotion

    def say(self, message: Message) -> None:
        """Tell the parent; it may be gone, which its line says as well."""
        frame = Encoder().encode(message)
        with suppress(BrokenPipeError):
            os.write(self._answers, struct.pack("<I", len(frame)) + frame)

    def _watch(self) -> None:
        try:
            with suppress(OSError, EOFError):
                while True:
                    try:
                        self._promotions.put(self._read())
                    except msgspec.MsgspecError as error:
                        self._promotions.put(str(error))
                    self._on_promotion()
            with suppress(OSError):  # a folder that has been taken from us, a closed terminal
                if self._files is not None:
                    self._files.remove_all()
                sys.stderr.flush()
        finally:
            # Whatever has gone wrong here: nobody else would end this process. Not sys.exit: the
            # main thread may be deep in a forward pass, and nothing of what it holds is worth
            # waiting for.
            os._exit(0)

    def _read(self) -> CoreConfig:
        (size,) = struct.unpack("<I", read_exactly(self._pipe, 4))
        config = msgspec.msgpack.decode(read_exactly(self._pipe, size), type=CoreConfig)
        if not config.is_standby:
            self._files = CoreFiles(config)
        return config
