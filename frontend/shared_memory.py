"""Memory without a name, for what the cores of one engine share: their packed weights."""

import os
import weakref


class SharedMemory:
    """Owns a descriptor of such memory, which cores inherit. The memory lives as long as anyone
    has it open or mapped; nobody else can find it, and it leaves nothing behind.

    One engine needs one, for one model.
    """

    def __init__(self) -> None:
        """Make it, empty. Elsewhere than on Linux there is none, and every core has its own."""
        self.file: int | None = None
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("footplate-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._finalizer = weakref.finalize(self, os.close, self.file)

    def close(self) -> None:
        """Give up this process's hold. May be called more than once."""
        if self.file is not None:
            self._finalizer()
            self.file = None
