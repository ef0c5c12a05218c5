"""Memory for the KV cache, its beginning touched while the process has nothing else to do.

The system hands out memory when it is first touched, and in a virtual machine whose host does the
same that costs ten times what writing to it costs: an eighth of the time of the first prompts.
While weights are loaded one core is idle. Imports no torch.
"""

import ctypes
import mmap
import threading
from contextlib import suppress

# What the first requests of a process fill, some thousand tokens. The whole of a cache would take
# seconds, and memory that perhaps nobody needs.
MAX_TOUCHED_BYTES = 2**27
HUGE_PAGE_BYTES = 2**21
_STEP_BYTES = 2**24
_MADV_POPULATE_WRITE = 23  # Linux 5.14; elsewhere nothing is touched


class TouchedMemory:
    """One region of zeros, to be taken by one owner or to be given back.

    Args:
        num_bytes: of the region; only what is touched takes memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._pages: mmap.mmap | None = None
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        with suppress(OSError, AttributeError):  # not so much address space; not Linux
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._pages = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=flags)
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
            self._address = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            self._pages.madvise(mmap.MADV_HUGEPAGE)
            self._thread.start()

    def take(self, num_bytes: int) -> mmap.mmap | None:
        """The region, for the first who needs most of what is touched, if it is long enough. It is
        longer; what is touched begins on its first huge page."""
        if not min(MAX_TOUCHED_BYTES, self._num_bytes) <= 2 * num_bytes <= 2 * self._num_bytes:
            return None
        pages, self._pages = self._pages, None
        self._stop()
        return pages

    def close(self) -> None:
        """Give back what nobody has taken."""
        self._stop()
        self._pages = None

    def _stop(self) -> None:
        self._enough.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _touch(self) -> None:
        # Not the method of mmap, which holds the interpreter's lock meanwhile.
        madvise = ctypes.CDLL(None).madvise
        end = min(MAX_TOUCHED_BYTES, self._num_bytes)
        for start in range(0, end, _STEP_BYTES):
            address = ctypes.c_void_p(self._address + start)
            size = ctypes.c_size_t(min(_STEP_BYTES, end - start))
            if self._enough.is_set() or madvise(address, size, _MADV_POPULATE_WRITE):
                return
