"""How often the system has killed processes because memory ran out (Linux)."""

from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def count_oom_kills(
    own_cgroup: Path = Path("/proc/self/cgroup"), vmstat: Path = Path("/proc/vmstat")
) -> int:
    """In this process's control group, or on the whole machine where groups are not counted; 0
    where nobody counts. Only a difference means anything."""
    with suppress(OSError, ValueError, IndexError, StopIteration):
        # "0::/path" is the line of version 2.
        lines = own_cgroup.read_text().splitlines()
        path = next(line for line in lines if line.startswith("0::"))[3:]
        return _count(_CGROUPS / path.lstrip("/") / "memory.events")
    with suppress(OSError, ValueError, IndexError, StopIteration):
        return _count(vmstat)
    return 0


def _count(path: Path) -> int:
    lines = (line.split() for line in path.read_text().splitlines())
    return int(next(fields[1] for fields in lines if fields[0] == "oom_kill"))
