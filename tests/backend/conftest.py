"""For all tests of the backend."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kernel_folder(pytestconfig: pytest.Config) -> Path:
    """Kept from one run of the tests to the next: compiling takes longer than testing."""
    cache = pytestconfig.cache
    assert cache is not None
    folder = cache.mkdir("kernels")
    folder.chmod(0o700)
    return folder
