"""Keys of encrypted links (CURVE, curvezmq.org): the files they lie in, and what a key may do.

    key_dir/                 mode 0700, the engine's
        server.key           mode 0600: the engine's key pair
        clients/NAME.json    mode 0600: one client's public key, its role and its limits
    NAME.key                 mode 0600, the client's: its key pair, and the engine's public key

All are small JSON objects; keys are Z85 text. Removing a file from `clients` revokes the key.
Nothing here makes keys: a key pair is given (`zmq.curve_keypair`).
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from footplate.protocol.bounds import MAX_INT, require_int
from footplate.protocol.errors import EngineStartError, InvalidParameterError, KeyFileError
from footplate.protocol.links import make_owned_dir, require_owned_dir

Role = Literal["generate", "admin"]
# 32 bytes as Z85 (rfc.zeromq.org/spec/32).
Z85_PATTERN = r"^[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z"
Z85 = Annotated[str, Meta(pattern=Z85_PATTERN)]
_Limit = Annotated[int, Meta(ge=1)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_KEY_FILE_BYTES = 10_000

T = TypeVar("T")


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public key and its secret one."""

    public_key: Z85
    secret_key: Z85

    def __repr__(self) -> str:  # a secret must not get into a log
        return f"{type(self).__name__}(public_key={self.public_key!r})"


class ClientKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client needs to come in, and to know that it has come to the right engine."""

    public_key: Z85
    secret_key: Z85
    server_public_key: Z85

    def __repr__(self) -> str:
        return f"{type(self).__name__}(public_key={self.public_key!r})"


class Guest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine knows of one client's key.

    Attributes:
        role: "generate", or "admin", who may also ask for what concerns the others.
        max_requests: most live requests of all connections with this key; None is no limit.
        max_queued_tokens: most prompt tokens of those that wait for their first step.
    """

    public_key: Z85
    role: Role = "generate"
    max_requests: _Limit | None = None
    max_queued_tokens: _Limit | None = None


def is_key(text: str) -> bool:
    """Whether this is a key as Z85."""
    return re.match(Z85_PATTERN, text) is not None


# ---- reading


def has_server_key(key_dir: Path) -> bool:
    """Whether the engine has a key, usable or not."""
    return os.path.lexists(_server_file(key_dir))


def read_server_key(key_dir: Path) -> KeyPair:
    """The engine's key pair. Raises KeyFileError."""
    return _read(_server_file(key_dir), KeyPair)


def read_client_keys(key_file: Path) -> ClientKeys:
    """A client's keys. Raises KeyFileError."""
    return _read(key_file, ClientKeys)


def read_guests(key_dir: Path) -> tuple[dict[str, tuple[str, Guest]], list[KeyFileError]]:
    """Who may come in: name and guest by public key, and what is wrong with the other files.

    A key that two files have lets nobody in: they may disagree about what it may do.
    """
    guests: dict[str, tuple[str, Guest]] = {}
    errors: list[KeyFileError] = []
    try:
        require_owned_dir(guest_dir(key_dir))
    except (EngineStartError, OSError) as error:
        # Whoever may write there decides who comes in.
        return {}, [KeyFileError(f"nobody is let in: {error}")]
    twice: set[str] = set()
    for path in guest_files(key_dir):
        try:
            guest = _read(path, Guest)
        except KeyFileError as error:
            errors.append(error)
            continue
        if guest.public_key in guests:
            twice.add(guest.public_key)
            errors.append(KeyFileError(f"{path} has the key of another client: remove one of them"))
        guests[guest.public_key] = (path.stem, guest)
    return {key: guest for key, guest in guests.items() if key not in twice}, errors


def guest_files(key_dir: Path) -> list[Path]:
    """The files of all clients; none where there is no folder."""
    with suppress(OSError):
        return sorted(path for path in guest_dir(key_dir).iterdir() if path.suffix == ".json")
    return []


def _read(path: Path, kind: type[T]) -> T:
    """Raises KeyFileError."""
    try:
        # A link or a pipe that somebody has put there is not opened, nor waited for.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFileError(
            f"the key file {path} cannot be opened ({os.strerror(error.errno or 0)}): "
            "make keys with scripts/make_keys.py"
        ) from None
    try:
        status = os.fstat(file)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        if not is_ours or status.st_mode & 0o077:
            raise KeyFileError(
                f"the key file {path} must be a file that you own and only you can read: "
                f"chmod 600 {path}, or make new keys if others may have read it"
            )
        data = os.read(file, MAX_KEY_FILE_BYTES)
    finally:
        os.close(file)
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        # The text names fields and types, never what the file holds.
        raise KeyFileError(f"the key file {path} is damaged ({error}): make new keys") from None


# ---- writing


def make_server_key(key_dir: Path, keys: KeyPair) -> None:
    """Make the folder of an engine's keys.

    Raises:
        KeyFileError: there is a key already.
        EngineStartError: the folder is not ours alone.
    """
    make_owned_dir(key_dir)
    make_owned_dir(guest_dir(key_dir))
    _write(_server_file(key_dir), keys)


def make_client_key(key_dir: Path, name: str, keys: KeyPair, key_file: Path, guest: Guest) -> None:
    """Let a new client in, and write the file that it needs.

    Raises:
        InvalidParameterError: a name that is no good file name, or a limit below 1.
        KeyFileError: the client or the file is there already, or the engine has no key.
    """
    for limit in ("max_requests", "max_queued_tokens"):
        if getattr(guest, limit) is not None:
            require_int(limit, getattr(guest, limit), 1, MAX_INT)
    path = _guest_file(key_dir, name)
    server = read_server_key(key_dir)
    for taken in (path, key_file):
        if os.path.lexists(taken):
            raise KeyFileError(f"{taken} is there already: revoke it first, or take another name")
    _write(key_file, ClientKeys(keys.public_key, keys.secret_key, server.public_key))
    try:
        _write(path, guest)
    except BaseException:
        key_file.unlink()  # it would open nothing
        raise


def revoke(key_dir: Path, name: str) -> None:
    """Let a client in no longer; an engine that runs ends its connections within seconds.

    Raises:
        InvalidParameterError: a name that is no good file name.
        KeyFileError: there is no such client.
    """
    path = _guest_file(key_dir, name)
    try:
        path.unlink()
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist: there is no client {name}") from None


def _server_file(key_dir: Path) -> Path:
    return key_dir / "server.key"


def guest_dir(key_dir: Path) -> Path:
    """Where the files of all clients are."""
    return key_dir / "clients"


def _guest_file(key_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InvalidParameterError(
            "name", name, "1 to 64 letters, digits, _ and -, beginning with a letter or digit"
        )
    return guest_dir(key_dir) / f"{name}.json"


def _write(path: Path, content: msgspec.Struct) -> None:
    """Write a file that is complete from the moment that it has its name.

    Raises:
        KeyFileError: the file is there already, or cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(content)) + b"\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.fchmod(file, 0o600)  # whatever the umask
            os.write(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        os.link(draft, path)  # unlike a rename, it does not replace what is there
    except FileExistsError:
        raise KeyFileError(f"{path} is there already: keys are never overwritten") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from None
    finally:
        draft.unlink(missing_ok=True)
