"""What comes through pipes and pairs of sockets comes in pieces."""

import os


def read_exactly(file: int, size: int) -> bytes:
    """So many bytes from a descriptor.

    Raises:
        EOFError: its other end was closed before.
        OSError: it cannot be read.
    """
    data = b""
    while len(data) < size:
        chunk = os.read(file, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data
