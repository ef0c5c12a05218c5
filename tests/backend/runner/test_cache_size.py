import logging
from pathlib import Path
from typing import Any

import pytest

from footplate.backend.runner.cache_size import (
    MAX_DEFAULT_HOST_BYTES,
    CacheSize,
    available_host_bytes,
    size_cache,
)
from footplate.backend.runner.errors import ModelLoadError
from footplate.protocol.config import CacheConfig, SchedulerConfig

MIB = 2**20


def size(
    *,
    bytes_per_block: int = MIB,
    budget_bytes: int = 100 * MIB,
    wanted_len: int = 160,
    len_is_given: bool = False,
    max_num_seqs: int = 256,
    **cache: Any,
) -> CacheSize:
    return size_cache(
        CacheConfig(**cache),
        SchedulerConfig(max_num_seqs=max_num_seqs),
        bytes_per_block=bytes_per_block,
        budget_bytes=budget_bytes,
        wanted_len=wanted_len,
        len_is_given=len_is_given,
    )


def test_the_most_explicit_option_wins() -> None:
    assert size() == CacheSize(100, 160)
    assert size(kv_cache_memory_bytes=20 * MIB + 5) == CacheSize(20, 160)
    assert size(kv_cache_memory_bytes=20 * MIB, num_gpu_blocks_override=10) == CacheSize(10, 160)


def test_by_default_no_more_than_all_requests_could_use() -> None:
    assert size(max_num_seqs=3) == CacheSize(30, 160)
    assert size(max_num_seqs=3, wanted_len=161).num_blocks == 33
    assert size(max_num_seqs=3, num_gpu_blocks_override=500).num_blocks == 500


def test_state_that_does_not_grow_needs_no_budget() -> None:
    assert size(bytes_per_block=0, budget_bytes=0, max_num_seqs=3) == CacheSize(30, 160)


def test_a_length_that_was_asked_for_must_fit() -> None:
    with pytest.raises(ModelLoadError) as caught:
        size(wanted_len=400, len_is_given=True, kv_cache_memory_bytes=20 * MIB)
    assert str(caught.value) == (
        "the KV cache holds 20 blocks of 16 tokens (20.0 MiB), and one request of "
        "max_model_len=400 needs 25 (25.0 MiB): raise kv_cache_memory_bytes or lower "
        "max_model_len to at most 320"
    )
    with pytest.raises(ModelLoadError, match="raise num_gpu_blocks_override or lower"):
        size(wanted_len=400, len_is_given=True, num_gpu_blocks_override=20)
    assert size(wanted_len=320, len_is_given=True, num_gpu_blocks_override=20).num_blocks == 20


def test_the_models_own_length_is_lowered_to_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert size(wanted_len=4096, kv_cache_memory_bytes=20 * MIB) == CacheSize(20, 320)
    assert caplog.messages == [
        "max_model_len is 320 instead of the model's 4096: the KV cache holds 20 blocks of 16 "
        "tokens (20.0 MiB); raise kv_cache_memory_bytes for more"
    ]


def test_a_cache_without_blocks_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match="holds 0 blocks"):
        size(kv_cache_memory_bytes=MIB - 1)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_DOT_", ".")).write_text(text)
    return folder


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    proc = write(tmp_path, meminfo="MemTotal: 100 kB\nMemAvailable:   60 kB\n")
    assert available_host_bytes(proc, tmp_path / "none") == 60 * 1024


@pytest.mark.parametrize(("limit", "expected"), [("50000", 20_000), ("max", 61_440)])
def test_a_container_may_have_less(limit: str, expected: int, tmp_path: Path) -> None:
    proc = write(tmp_path, meminfo="MemAvailable:   60 kB\n")
    write(tmp_path, memory_DOT_max=limit, memory_DOT_current="30000")
    assert available_host_bytes(proc, tmp_path) == expected


def test_an_old_container_may_have_less(tmp_path: Path) -> None:
    proc = write(tmp_path, meminfo="MemAvailable:   60 kB\n")
    (tmp_path / "memory").mkdir()
    write(
        tmp_path / "memory",
        memory_DOT_limit_in_bytes="50000",
        memory_DOT_usage_in_bytes="49000",
    )
    assert available_host_bytes(proc, tmp_path) == 1000


def test_without_proc_little_is_assumed(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path, tmp_path) == MAX_DEFAULT_HOST_BYTES
