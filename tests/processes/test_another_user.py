"""Another user of the same machine, who tries to come in over ipc. Only root can play two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from footplate.frontend import AsyncLLMEngine
from footplate.protocol.errors import EngineStartError

from .conftest import PATIENCE_S, StartCore, in_time
from .raw_client import raw_client

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")

# Python itself may lie where only root can read it, so it is loaded first.
KNOCK = """
import os, socket, sys
user = int(sys.argv[2])
os.setgroups([])
os.setgid(user)
os.setuid(user)
GREETING = b"\\xff" + b"\\0" * 8 + b"\\x7f\\x03\\0" + b"NULL".ljust(20, b"\\0") + b"\\0" * 32
peer = socket.socket(socket.AF_UNIX)
try:
    peer.connect(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
else:
    # A greeting of ZeroMQ's protocol, and the READY of a DEALER without keys.
    peer.sendall(GREETING)
    peer.sendall(b"\\x04\\x1c\\x05READY\\x0bSocket-Type\\0\\0\\0\\x06DEALER")
    data = b""
    while b"READY" not in data and b"ERROR" not in data and (chunk := peer.recv(4096)):
        data += chunk
    print("let in" if b"READY" in data else "thrown out")
"""


def knock(path: Path, user: int) -> str:
    """What another user's process gets to hear."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", KNOCK, str(path), str(user)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_user_cannot_even_find_the_socket(start_core: StartCore) -> None:
    core = start_core()
    with raw_client(core.address) as witness:
        witness.join()
        assert knock(core.folder / "engine.sock", NOBODY) == "PermissionError"


def test_another_user_who_got_hold_of_the_path_is_thrown_out_and_counted(
    start_core: StartCore,
) -> None:
    core = start_core()
    with raw_client(core.address) as witness:
        witness.join()
        core.folder.parent.chmod(0o755)
        core.folder.chmod(0o755)
        (core.folder / "engine.sock").chmod(0o666)
        before = witness.stats()
        assert knock(core.folder / "engine.sock", NOBODY) == "thrown out"
        assert in_time(lambda: witness.stats().num_rejected_peers == before.num_rejected_peers + 1)
        assert witness.stats().num_bad_messages == before.num_bad_messages


async def test_a_client_does_not_enter_a_folder_of_somebody_else(start_core: StartCore) -> None:
    core = start_core()
    os.chown(core.folder, NOBODY, NOBODY)
    try:
        with pytest.raises(EngineStartError, match="you own"):
            await AsyncLLMEngine.connect(core.address).start()
    finally:
        os.chown(core.folder, 0, 0)
