"""Kernels of every instruction set that this CPU can run, each compiled with its own flags."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from footplate.backend.kernels.build import PLAIN, InstructionSet, load, usable_instruction_sets
from footplate.backend.kernels.ops import Kernels

ALL = [*usable_instruction_sets(), PLAIN]


@pytest.fixture(scope="session", params=ALL, ids=lambda isa: isa.name)
def kernels(request: pytest.FixtureRequest, kernel_folder: Path) -> Kernels:
    """The kernels of one instruction set."""
    instruction_set: InstructionSet = request.param
    library = load(kernel_folder, instruction_set=instruction_set)
    assert library is not None, "this machine has no compiler that works"
    loaded = Kernels(library)
    assert loaded.instruction_set == instruction_set.name
    return loaded


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on matrices of this size wait for each other, on a busy machine for long. Tests
    of `threads` ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
