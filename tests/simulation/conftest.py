"""Which schedules to run.

    pytest tests/simulation --simulation-seed 17       replays one
    pytest tests/simulation --simulation-count 100000  looks further

Without options it is always the same two thousand: a failure is no accident of the day.
"""

import pytest

DEFAULT_COUNT = 2000
CHUNK = 100  # seeds per test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulation-seed", type=int, help="replay one random schedule")
    parser.addoption("--simulation-count", type=int, help="how many random schedules to run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        # Options of this folder are unknown when pytest was started above it.
        seed = metafunc.config.getoption("--simulation-seed", default=None)
        count = metafunc.config.getoption("--simulation-count", default=None) or DEFAULT_COUNT
        starts = range(0, count, CHUNK)
        chunks = [range(start, min(start + CHUNK, count)) for start in starts]
        if seed is not None:
            chunks = [range(seed, seed + 1)]
        metafunc.parametrize("seeds", chunks, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
