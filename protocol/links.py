"""Where client and core meet: addresses, the files of an ipc link, and who may see them.

A core binds its ROUTER at an address `ipc:///folder/engine.sock` or `tcp://host:port`. Each client
binds a PULL of its own. Over ipc its path is derived from the core's path and the client's id, so
that the core can check what a client claims, and can remove the file of a client that was killed.
Over tcp it is a port of the machine that the client's connection comes from.
"""

import ipaddress
import os
import re
import secrets
import stat
import tempfile
from hashlib import blake2b
from pathlib import Path

from footplate.protocol.bounds import MAX_CLIENT_KEY_CHARS, MIN_CLIENT_KEY_CHARS
from footplate.protocol.errors import EngineStartError, InvalidParameterError

# A Unix socket address holds 108 bytes on Linux and 104 on macOS; a client's path adds the
# length of its id to the core's.
MAX_IPC_PATH_BYTES = 100
CLIENT_ID_BYTES = 16
SESSION_BYTES = 16
_CLIENT_TAG_CHARS = 12
_HOST = re.compile(r"[A-Za-z0-9.-]+|\*")
_EVERY_HOST = ("*", "0.0.0.0")


def new_client_id() -> bytes:
    """A routing id for one client incarnation. ZeroMQ reserves a leading zero byte."""
    return b"c" + secrets.token_bytes(CLIENT_ID_BYTES - 1)


def new_session() -> bytes:
    """A name for one client in all of its connections, that nobody else can guess."""
    return secrets.token_bytes(SESSION_BYTES)


def session_of(client_key: str) -> bytes:
    """The name of the client with this key, in whatever process it is. The key cannot be told from
    it.

    Raises:
        InvalidParameterError: it is too short to be a secret, or too long. The error does not
            repeat it.
    """
    if not isinstance(client_key, str):
        found = f"<{type(client_key).__name__}>"
    elif not MIN_CLIENT_KEY_CHARS <= len(client_key) <= MAX_CLIENT_KEY_CHARS:
        found = f"<{len(client_key)} characters>"
    else:
        key = client_key.encode(errors="surrogatepass")
        return blake2b(key, digest_size=SESSION_BYTES, person=b"client key").digest()
    raise InvalidParameterError(
        "client_key",
        found,
        f"a secret string of {MIN_CLIENT_KEY_CHARS} to {MAX_CLIENT_KEY_CHARS} characters",
    )


def ipc_path(address: str) -> Path | None:
    """The socket file of an ipc address; None for a tcp address.

    Raises:
        InvalidParameterError: neither form, or a path too long.
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
    is_tcp = address.startswith("tcp://") and colon and _HOST.fullmatch(host)
    if not is_tcp or not _is_port(port):
        raise InvalidParameterError(
            "address", address, "ipc:///absolute/path or tcp://127.0.0.1:port"
        )
    return None


def tcp_host_and_port(address: str) -> tuple[str, int]:
    """The parts of a tcp address."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def require_protected(address: str, *, has_keys: bool, insecure_tcp: bool) -> None:
    """Refuse a link that would let in whoever comes.

    Args:
        has_keys: the peers will prove who they are (CURVE).
        insecure_tcp: the owner says that everybody on this machine may come in.

    Raises:
        InvalidParameterError: with what would do.
    """
    if ipc_path(address) is not None:
        if has_keys or insecure_tcp:
            raise InvalidParameterError(
                "address",
                address,
                "tcp://host:port with keys: an ipc link needs none, its folder lets nobody else in",
            )
        return
    if has_keys:
        if insecure_tcp:
            raise InvalidParameterError("insecure_tcp", True, "left out where there are keys")
        return
    if not is_loopback(tcp_host_and_port(address)[0]):
        raise InvalidParameterError(
            "address",
            address,
            "on a loopback host such as 127.0.0.1, or have keys: key_dir for "
            "the engine and key_file for its clients (scripts/make_keys.py makes them)",
        )
    if not insecure_tcp:
        raise InvalidParameterError(
            "address",
            address,
            "used with keys (key_dir for the engine, key_file for its clients), "
            "or with insecure_tcp, which lets in every user of this machine",
        )


def address_to_connect(address: str) -> str:
    """Where a client on the core's own machine finds a core that has bound `address`."""
    if ipc_path(address) is None and tcp_host_and_port(address)[0] in _EVERY_HOST:
        return f"tcp://127.0.0.1:{tcp_host_and_port(address)[1]}"
    return address


def output_endpoint(address: str, client_id: bytes, own_host: str | None = None) -> str:
    """Where the client's PULL binds: beside the core's socket, or on a free port.

    Args:
        own_host: the client's address on the way to the core; None takes the core's, which is
            the same on a loopback link.
    """
    path = ipc_path(address)
    if path is None:
        return f"tcp://{own_host or tcp_host_and_port(address)[0]}:*"
    return f"ipc://{path}.{client_id.hex()[2 : 2 + _CLIENT_TAG_CHARS - 1]}"


def accepts_output_endpoint(
    address: str, client_id: bytes, endpoint: str, peer_host: str = "127.0.0.1"
) -> bool:
    """Whether a core at `address` may connect to what this client names as its PULL: a client
    that may send the core anywhere reaches what only the core can reach.

    Args:
        peer_host: over tcp, where the client's own connection comes from.
    """
    if ipc_path(address) is not None:
        return endpoint == output_endpoint(address, client_id)
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    is_theirs = host == peer_host or (is_loopback(host) and is_loopback(peer_host))
    return endpoint.startswith("tcp://") and is_theirs and _is_port(port)


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
        EngineStartError: something else is there, somebody else owns it, or others may enter.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # something that is no folder
    except OSError as error:
        raise EngineStartError(
            f"the folder {folder} cannot be made: {error.strerror}: it must be a directory that "
            "you own, choose another address"
        ) from None
    require_owned_dir(folder)


def require_owned_dir(folder: Path) -> None:
    """Check that `folder` is ours alone. Whoever else may enter it may listen where we connect,
    or connect where we listen.

    Raises:
        EngineStartError: it is no folder, somebody else owns it, or others may enter.
    """
    status = folder.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & 0o077:
        raise EngineStartError(
            f"the folder {folder} must be a directory that you own and only you can enter "
            f"(chmod 700 {folder}): change it, or choose another address"
        )


def _temp_base() -> Path:
    # Not tempfile.gettempdir(): a long TMPDIR would not fit into a socket address.
    return Path("/tmp") / f"footplate-{os.getuid()}"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 2**16


def is_loopback(host: str) -> bool:
    """Whether packets to this host stay on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
