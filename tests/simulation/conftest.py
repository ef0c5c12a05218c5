"""Which schedules of one core, and which worlds of cores that die, to run.

    pytest tests/simulation --simulation-seed 17       replays one of each
    pytest tests/simulation --simulation-count 100000  looks further; so does scripts/simulate.py

Without options they are always the same: a failure is no accident of the day.
"""

import pytest

# By the name of the argument that takes them.
DEFAULT_COUNTS = {"seeds": 800, "world_seeds": 1500}
CHUNK = 100  # seeds per test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulation-seed", type=int, help="replay one random run")
    parser.addoption("--simulation-count", type=int, help="how many random runs there are")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in DEFAULT_COUNTS.keys() & set(metafunc.fixturenames):
        # Options of this folder are unknown when pytest was started above it.
        seed = metafunc.config.getoption("--simulation-seed", default=None)
        count = metafunc.config.getoption("--simulation-count", default=None)
        count = count or DEFAULT_COUNTS[name]
        starts = range(0, count, CHUNK)
        chunks = [range(start, min(start + CHUNK, count)) for start in starts]
        if seed is not None:
            chunks = [range(seed, seed + 1)]
        metafunc.parametrize(name, chunks, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
