"""Where client and core meet: addresses, the files of an ipc link, and who may see them.

A core binds its ROUTER at an address `ipc:///folder/engine.sock` or `tcp://127.0.0.1:port`. Each
client binds a PULL of its own. Over ipc its path is derived from the core's path and the client's
id, so that the core can check what a client claims, and can remove the file of a client that was
killed.
"""

import ipaddress
import os
import secrets
import stat
import tempfile
from pathlib import Path

from footplate.protocol.errors import EngineStartError, InvalidParameterError

# A Unix socket address holds 108 bytes on Linux and 104 on macOS; a client's path adds the
# length of its id to the core's.
MAX_IPC_PATH_BYTES = 100
CLIENT_ID_BYTES = 16
SESSION_BYTES = 16
_CLIENT_TAG_CHARS = 12


def new_client_id() -> bytes:
    """A routing id for one client incarnation. ZeroMQ reserves a leading zero byte."""
    return b"c" + secrets.token_bytes(CLIENT_ID_BYTES - 1)


def new_session() -> bytes:
    """A name for one client in all of its connections, that nobody else can guess."""
    return secrets.token_bytes(SESSION_BYTES)


def ipc_path(address: str) -> Path | None:
    """The socket file of an ipc address; None for a tcp address.

    Raises:
        InvalidParameterError: neither form, a path too long, or a host that is not loopback.
    """
    if address.startswith("ipc://"):
        path = Path(address.removeprefix("ipc://"))
        longest = len(os.fsencode(path)) + 1 + _CLIENT_TAG_CHARS
        if not path.is_absolute() or longest > MAX_IPC_PATH_BYTES:
            limit = MAX_IPC_PATH_BYTES - 1 - _CLIENT_TAG_CHARS
            raise InvalidParameterError(
                "address", address, f"ipc:// and an absolute path of at most {limit} bytes"
            )
        return path
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not colon or not _is_port(port):
        raise InvalidParameterError(
            "address", address, "ipc:///absolute/path or tcp://127.0.0.1:port"
        )
    if not _is_loopback(host):
        # The link carries no authentication yet, so it must not leave the machine.
        raise InvalidParameterError("address", address, "on a loopback host such as 127.0.0.1")
    return None


def output_endpoint(address: str, client_id: bytes) -> str:
    """Where the client's PULL binds: beside the core's socket, or on a free loopback port."""
    path = ipc_path(address)
    if path is None:
        host = address.removeprefix("tcp://").rpartition(":")[0]
        return f"tcp://{host}:*"
    return f"ipc://{path}.{client_id.hex()[2 : 2 + _CLIENT_TAG_CHARS - 1]}"


def accepts_output_endpoint(address: str, client_id: bytes, endpoint: str) -> bool:
    """Whether a core at `address` may connect to what this client names as its PULL."""
    expected = output_endpoint(address, client_id)
    if expected.startswith("ipc://"):
        return endpoint == expected
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return endpoint.startswith("tcp://") and _is_loopback(host) and _is_port(port)


def default_address() -> str:
    """Where a launched core listens and a client looks when neither is told."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "footplate" if base else _temp_base()
    return f"ipc://{folder / 'engine.sock'}"


def make_private_dir() -> Path:
    """A fresh folder, mode 0700, for the sockets of one embedded engine."""
    base = _temp_base()
    make_owned_dir(base)
    return Path(tempfile.mkdtemp(prefix="core-", dir=base))


def make_owned_dir(folder: Path) -> None:
    """Make `folder` with mode 0700, or check that it is ours alone if it exists.

    Raises:
        EngineStartError: somebody else owns it, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not ours or status.st_mode & 0o022:
        raise EngineStartError(
            f"the folder {folder} must be a directory that you own and only you can write to: "
            "remove it, or choose another address"
        )


def _temp_base() -> Path:
    # Not tempfile.gettempdir(): a long TMPDIR would not fit into a socket address.
    return Path("/tmp") / f"footplate-{os.getuid()}"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 2**16


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
