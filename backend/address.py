"""Whether somebody listens on an address already, and who."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from footplate.protocol.links import ipc_path, tcp_host_and_port


def is_free(address: str) -> bool:
    """Whether a core could probably listen there. A guess, which leaves no trace: only taking it
    makes sure."""
    path = ipc_path(address)
    return _is_port_free(*tcp_host_and_port(address)) if path is None else _is_path_free(path)


def _is_path_free(path: Path) -> bool:
    try:
        lock = path.with_name(f"{path.name}.lock").stat().st_ino
        # Not by trying: whoever wants it at this moment would not get it.
        held = Path("/proc/locks").read_text()
    except OSError:
        return True  # no lock, or no way to know
    return f":{lock} " not in held


def _is_port_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def name_listener(address: str) -> str:
    """Who listens on a TCP address, in words; empty where Linux does not tell this user."""
    port = int(address.rpartition(":")[2]) if address.startswith("tcp://") else -1
    inodes = set()
    with suppress(OSError), open("/proc/net/tcp") as table:
        for fields in map(str.split, table):
            if fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):  # 0A: it listens
                inodes.add(f"socket:[{fields[9]}]")
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if inodes and os.readlink(descriptor) in inodes:
                return f" (process {descriptor.parts[2]} does)"
    return ""
