"""An engine-core process from its first line to its last, however it came to be: as a fork of the
fork server, or by `python -m footplate.backend.main`, where that cannot fork.

Standard input brings the configuration (a length, then msgpack) and stays open as the death line.
Standard output carries messages in the same form: how far a standby is, and the last words of a
core that failed.
"""

import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import NoReturn

from footplate.backend.background import Background
from footplate.backend.core_process import root_cause, run_core
from footplate.backend.parent_line import ParentLine
from footplate.backend.termination import Terminated
from footplate.protocol.errors import AddressInUseError, EngineStartError
from footplate.protocol.messages import Refused

# sysexits.h: a configuration error, an internal error.
EX_CONFIG = 78
EX_SOFTWARE = 70


def run(asked_at: float) -> NoReturn:
    """Run the core, and end the process with its exit status.

    Args:
        asked_at: when somebody wanted it, in seconds of the monotonic clock.
    """
    try:
        status = main(asked_at)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    sys.stderr.flush()
    # Skips the interpreter's teardown: torch and a blocked daemon thread make it slow, and it has
    # nothing to save.
    os._exit(status)


def main(asked_at: float) -> int:
    """Run the core; return the exit status.

    Raises:
        SystemExit: it was told to end, or never told what to do.
    """
    # Whatever a library prints must not stand among our messages.
    background = Background()
    parent = ParentLine(0, os.dup(1), on_promotion=background.end)
    os.dup2(2, 1)
    faulthandler.enable()
    # Where every thread is, for whoever asks; written without a turn of the interpreter.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # A terminal sends its interrupt to everyone; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    os.umask(0o077)
    config = parent.read_config()
    parent.watch()
    logging.basicConfig(
        level=config.log_level, format="%(asctime)s [core] %(levelname)s %(name)s: %(message)s"
    )
    try:
        run_core(config, parent, background, asked_at)
    except Exception as error:
        logging.getLogger(__name__).info("the engine core ends", exc_info=True)
        in_use = isinstance(error, AddressInUseError)
        words = Refused("address", str(error)) if in_use else Refused("start", root_cause(error))
        parent.say(words)
        # What the user has to put right: a name, a setting, a file.
        return EX_CONFIG if isinstance(error, EngineStartError) else EX_SOFTWARE
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(128 + signum)


if __name__ == "__main__":
    run(time.monotonic())
