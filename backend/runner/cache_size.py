"""How many KV blocks there are, and how long a request can therefore be. Arithmetic only."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from footplate.backend.runner.errors import ModelLoadError
from footplate.protocol.config import CacheConfig, SchedulerConfig

logger = logging.getLogger(__name__)

GIB = 2**30
# Of host memory; more than that is worth asking the user for.
MAX_DEFAULT_HOST_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The outcome.

    Attributes:
        num_blocks: of the KV cache.
        max_model_len: prompt plus output, in tokens; fits into the blocks.
    """

    num_blocks: int
    max_model_len: int


def size_cache(
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    bytes_per_block: int,
    budget_bytes: int,
    wanted_len: int,
    len_is_given: bool,
) -> CacheSize:
    """Choose the number of blocks, by the first of these: `num_gpu_blocks_override`,
    `kv_cache_memory_bytes`, `budget_bytes`. Never more than all requests could use at once,
    unless the user gave the number.

    Args:
        bytes_per_block: of all layers together; 0 where nothing grows with the tokens.
        budget_bytes: what the device can spare.
        wanted_len: max_model_len as given by the user, or the model's own limit.
        len_is_given: a length that the user gave is an error when it does not fit; the model's
            own limit is lowered to what fits.

    Raises:
        ModelLoadError: one request does not fit.
    """
    size = cache.block_size
    most_useful = scheduler.max_num_seqs * -(-wanted_len // size)
    option = "kv_cache_memory_bytes"
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
        option = "num_gpu_blocks_override"
    elif not bytes_per_block:
        num_blocks = most_useful
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // bytes_per_block
    else:
        num_blocks = min(budget_bytes // bytes_per_block, most_useful)
    capacity = num_blocks * size
    if wanted_len <= capacity:
        return CacheSize(num_blocks, wanted_len)
    there = f"{num_blocks} blocks of {size} tokens ({_mib(num_blocks * bytes_per_block)})"
    needed = -(-wanted_len // size)
    if len_is_given or not num_blocks:
        raise ModelLoadError(
            f"the KV cache holds {there}, and one request of max_model_len={wanted_len} needs "
            f"{needed} ({_mib(needed * bytes_per_block)}): raise {option} or lower max_model_len"
            + (f" to at most {capacity}" if num_blocks else "")
        )
    logger.warning(
        "max_model_len is %d instead of the model's %d: the KV cache holds %s; raise %s for more",
        capacity,
        wanted_len,
        there,
        option,
    )
    return CacheSize(num_blocks, capacity)


def default_host_bytes() -> int:
    """What the KV cache takes of host memory unless told otherwise."""
    return min(MAX_DEFAULT_HOST_BYTES, available_host_bytes() // 2)


def available_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could still get, in bytes: what the machine has available, or
    what the container's limit leaves, if that is less."""
    available = _memory_available(proc / "meminfo")
    # Control groups of version 2, then of version 1.
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        # A group without a limit says "max", or a number beyond any memory.
        with suppress(OSError, ValueError):
            left = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            available = min(available, max(0, left))
    return available


def _memory_available(meminfo: Path) -> int:
    with suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return MAX_DEFAULT_HOST_BYTES  # not Linux: assume little


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
