"""Zeroed memory: aligned, lazily given, and touched ahead where that has been arranged."""

import mmap
from pathlib import Path

import pytest
import torch

from footplate.backend.kernels import touched_memory
from footplate.backend.kernels.large_memory import CACHE_LINE_BYTES, zeroed
from footplate.backend.kernels.touched_memory import HUGE_PAGE_BYTES, TouchedMemory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("num_words", [0, 1, 1000, HUGE_PAGE_BYTES // 4, 3_000_001])
def test_memory_is_zeroed_and_aligned(num_words: int) -> None:
    memory = zeroed((num_words,), torch.int32)
    assert memory.shape == (num_words,) and not memory.any()
    is_large = memory.nbytes >= HUGE_PAGE_BYTES
    assert memory.data_ptr() % (HUGE_PAGE_BYTES if is_large else CACHE_LINE_BYTES) == 0
    memory.fill_(1)
    assert memory.all()


def test_memory_costs_nothing_until_it_is_used() -> None:
    before = resident_bytes()
    memory = zeroed((2**30,), torch.uint8)
    assert resident_bytes() - before < 2**24
    memory[: 2**26] = 1
    assert 2**26 <= resident_bytes() - before < 2**27


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> TouchedMemory:
    monkeypatch.setattr(touched_memory, "MAX_TOUCHED_BYTES", 2**26)
    return TouchedMemory(2**28)


def test_who_needs_most_of_what_is_touched_gets_it_once(touched: TouchedMemory) -> None:
    assert touched.take(1000) is None  # a probe's cache
    assert touched.take(2**28 + 1) is None  # too long
    memory = zeroed((2**27,), torch.uint8, touched)
    assert memory.data_ptr() == touched._address and not memory.any()
    assert touched.take(2**27) is None
    touched.close()  # it has an owner
    memory.fill_(1)
    assert memory.all()


def test_the_beginning_is_in_memory_before_it_is_used(touched: TouchedMemory) -> None:
    touched._thread.join()
    memory = zeroed((2**28,), torch.uint8, touched)
    before = resident_bytes()
    memory[: 2**26] = 1
    assert resident_bytes() - before < 2**22


def test_what_nobody_takes_is_given_back(touched: TouchedMemory) -> None:
    touched._thread.join()
    before = resident_bytes()
    touched.close()
    assert before - resident_bytes() > 2**25
    assert touched.take(2**27) is None
