"""Engine cores that tests share, and a tokenizer for their vocabulary."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.links import make_private_dir

from .fake_model import write_tokenizer


@contextmanager
def running_core(args: EngineArgs) -> Iterator[str]:
    """A core process to attach to; its address."""
    folder = make_private_dir()
    address = f"ipc://{folder}/engine.sock"
    ended = threading.Event()
    process = CoreProcess(args.core_config(address, str(folder)), lambda error: ended.set())
    yield address
    assert not ended.is_set(), "a test has brought the core down"
    process.stop()


@pytest.fixture
def nothing_is_lost(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test after which asyncio complained: of an exception that nobody has seen, of an
    error in a callback."""
    yield
    complaints = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    assert not complaints


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer, as large as the fake model's vocabulary. Read only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def core_address(tokenizer_folder: Path) -> Iterator[str]:
    """A core with the fake model, for all tests that need nothing special; one at a time."""
    with running_core(
        EngineArgs(model="fake", tokenizer=str(tokenizer_folder), max_model_len=1_000_000)
    ) as address:
        yield address


@pytest.fixture(scope="session")
def small_core_address() -> Iterator[str]:
    """A core with a context window of 50 tokens."""
    with running_core(EngineArgs(model="fake", max_model_len=50)) as address:
        yield address


@pytest.fixture
async def engine(core_address: str) -> AsyncIterator[AsyncLLMEngine]:
    """A client of its own for each test; the core must hold nothing when it leaves."""
    async with AsyncLLMEngine.connect(core_address) as engine:
        yield engine
        stats = await engine.get_stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == (await engine.get_scheduler_config()).num_kv_blocks


@pytest.fixture
async def small_engine(small_core_address: str) -> AsyncIterator[AsyncLLMEngine]:
    """A client of the core with the small context window."""
    async with AsyncLLMEngine.connect(small_core_address) as engine:
        yield engine
