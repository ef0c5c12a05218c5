"""The keys that this side of an encrypted link needs, and where a client listens."""

import socket
from pathlib import Path

import zmq

from footplate.protocol.errors import EngineStartError
from footplate.protocol.keys import ClientKeys, KeyPair, read_client_keys, read_server_key
from footplate.protocol.links import ipc_path, is_loopback, require_protected, tcp_host_and_port


def new_key_pair() -> KeyPair:
    """A fresh pair, from ZeroMQ's own source of randomness."""
    public_key, secret_key = zmq.curve_keypair()
    return KeyPair(public_key.decode(), secret_key.decode())


def keys_to_connect(address: str, key_file: str | None, insecure_tcp: bool) -> ClientKeys | None:
    """What a client needs to attach to `address`; None where there are no keys.

    Raises:
        InvalidParameterError: address and keys do not go together.
        KeyFileError: the file cannot be used.
    """
    require_protected(address, has_keys=key_file is not None, insecure_tcp=insecure_tcp)
    return None if key_file is None else read_client_keys(Path(key_file))


def new_owner_keys(key_dir: str) -> ClientKeys:
    """Fresh keys for whoever starts the core: its public key is told the core as it starts, the
    secret one never leaves this process.

    Raises:
        KeyFileError: the engine's own key cannot be used.
    """
    pair, server = new_key_pair(), read_server_key(Path(key_dir))
    return ClientKeys(pair.public_key, pair.secret_key, server.public_key)


def own_host(address: str) -> str | None:
    """This machine's address on the way to the core at `address`; None where it does not matter.

    Raises:
        EngineStartError: there is no way.
    """
    if ipc_path(address) is not None:
        return None
    host, port = tcp_host_and_port(address)
    if is_loopback(host):
        return None
    try:
        # Connecting a datagram socket sends nothing; it only looks for the way.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineStartError(f"there is no way to {address}: {error.strerror}") from None
