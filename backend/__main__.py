"""`python -m footplate.backend`: one engine-core process. Started by a supervisor, not by hand.

Standard input brings the configuration (a length, then msgpack) and stays open as the death line.
Standard output carries at most one message: the last words of a core that failed.
"""

import faulthandler
import logging
import os
import signal
import struct
import sys
from types import FrameType

import msgspec

from footplate.backend.core_process import root_cause, run_core
from footplate.backend.termination import Terminated
from footplate.protocol.codec import Encoder
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import AddressInUseError
from footplate.protocol.messages import Refused

# sysexits.h: a configuration error, an internal error.
EX_CONFIG = 78
EX_SOFTWARE = 70


def main() -> int:
    """Run the core; return the exit status."""
    # Whatever a library prints must not stand among the last words.
    last_words = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable()
    # Where every thread is, for whoever asks; written without a turn of the interpreter.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # A terminal sends its interrupt to everyone; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    os.umask(0o077)
    config = read_config(0)
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s [core] %(levelname)s %(name)s: %(message)s"
    )
    try:
        run_core(config, death_line=0)
    except Exception as error:
        logging.getLogger(__name__).info("the engine core ends", exc_info=True)
        in_use = isinstance(error, AddressInUseError)
        words = Refused("address", str(error)) if in_use else Refused("start", root_cause(error))
        os.write(last_words, Encoder().encode(words))
        return EX_CONFIG if in_use else EX_SOFTWARE
    return 0


def read_config(pipe: int) -> CoreConfig:
    """Read one length-prefixed `CoreConfig`; leave the pipe open."""
    (size,) = struct.unpack("<I", _read_exactly(pipe, 4))
    try:
        return msgspec.msgpack.decode(_read_exactly(pipe, size), type=CoreConfig)
    except msgspec.MsgspecError as error:
        sys.exit(f"footplate.backend: the configuration on stdin makes no sense: {error}")


def _read_exactly(pipe: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = os.read(pipe, size - len(data))
        if not chunk:
            sys.exit("footplate.backend is started by a supervisor: no configuration on stdin")
        data += chunk
    return data


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(128 + signum)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Skips the interpreter's teardown: torch and a blocked daemon thread make it slow, and it has
    # nothing to save.
    os._exit(status)
