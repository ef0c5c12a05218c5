"""A second core that has loaded its model and waits: for its promotion, or for its end."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams
from footplate.frontend.shared_memory import SharedMemory
from footplate.protocol.config import ModelConfig, RequestConfig
from footplate.protocol.errors import AddressInUseError

from .conftest import PATIENCE_S, StartCore, files_in, in_time, is_gone
from .raw_client import raw_client
from .test_core_process import complete


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = SharedMemory()
    yield memory
    memory.close()


def cpu_seconds(process_id: int) -> float:
    times = psutil.Process(process_id).cpu_times()
    return float(times.user + times.system)


def maps_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/maps").read_text()


def test_a_standby_takes_no_address_no_memory_for_a_cache_and_no_cpu(start_core: StartCore) -> None:
    core = start_core(is_standby=True)
    assert core.standing_by.wait(PATIENCE_S)
    assert core.process.is_standing_by
    assert files_in(core.folder) == []
    before = cpu_seconds(core.process.process_id)
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(core.process.process_id).wait(timeout=0.3)
    assert cpu_seconds(core.process.process_id) - before <= 0.01
    core.process.stop()
    assert is_gone(core.process.process_id)
    assert core.ends.empty()
    # It is the folder of the core that serves.
    assert core.folder.exists()
    shutil.rmtree(core.folder)


def test_a_promoted_standby_serves_in_the_place_of_a_killed_core(start_core: StartCore) -> None:
    first = start_core()
    standby = start_core(standby_of=first)
    assert standby.standing_by.wait(PATIENCE_S)
    with raw_client(first.address) as client:
        assert not client.join().has_crashed
    os.kill(first.process.process_id, signal.SIGKILL)
    first.end()
    standby.promote(has_crashed=True, weights_version="second")
    with raw_client(first.address) as client:
        welcome = client.join()
    assert welcome.has_crashed
    assert welcome.weights_version == "second"
    assert welcome.process_id == standby.process.process_id


async def test_what_it_serves_with_is_what_the_promotion_says(start_core: StartCore) -> None:
    core = start_core(is_standby=True)
    assert core.standing_by.wait(PATIENCE_S)
    cache = msgspec.structs.replace(core.config.cache, num_gpu_blocks_override=99)
    core.promote(cache=cache, requests=RequestConfig(max_logprobs=3))
    engine = AsyncLLMEngine.connect(core.address)
    tokens = await complete(engine)
    assert len(tokens) == 5
    assert (await engine.get_scheduler_config()).num_kv_blocks == 99
    engine.shutdown()


async def test_a_standby_that_is_still_loading_can_be_promoted(start_core: StartCore) -> None:
    core = start_core("load waits", is_standby=True)
    assert await core.has_reached_gate()
    core.promote()
    assert not core.process.is_standing_by
    core.let_through()
    engine = AsyncLLMEngine.connect(core.address)
    assert len(await complete(engine)) == 5
    engine.shutdown()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ModelConfig(model="fake", max_model_len=99)}, "a standby with model "),
        (
            {"cache": EngineArgs(block_size=32).core_config("ipc:///nowhere").cache},
            "block_size 16 cannot serve",
        ),
        (
            {"requests": RequestConfig(logits_processors=("module:Class",))},
            "logits_processors () cannot serve ('module:Class',)",
        ),
    ],
)
def test_a_promotion_to_what_is_not_loaded_is_refused(
    change: dict[str, Any], words: str, start_core: StartCore
) -> None:
    core = start_core(is_standby=True)
    core.promote(**change)
    assert words in str(core.end())
    assert core.process.exit_status == os.EX_CONFIG
    # Whoever serves there next will need it; its supervisor removes it in the end.
    assert core.folder.exists()


def test_a_standby_does_not_take_the_address_of_a_live_core(start_core: StartCore) -> None:
    first = start_core()
    with raw_client(first.address) as client:
        client.join()
        standby = start_core(standby_of=first)
        standby.promote(private_dir=None)
        assert isinstance(standby.end(), AddressInUseError)
        assert client.join()


def test_a_promotion_that_makes_no_sense_ends_it_and_is_the_error(start_core: StartCore) -> None:
    core = start_core(is_standby=True)
    pipe = core.process._orders
    assert pipe is not None
    pipe.write(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    pipe.flush()
    assert "the promotion on stdin makes no sense" in str(core.end())


def test_a_model_that_a_standby_cannot_load_is_the_error(start_core: StartCore) -> None:
    core = start_core("load raises", is_standby=True)
    assert str(core.end()) == "ValueError: no weights in the folder"
    assert not core.standing_by.is_set()


def test_the_death_of_a_standby_is_told(start_core: StartCore) -> None:
    core = start_core(is_standby=True)
    assert core.standing_by.wait(PATIENCE_S)
    os.kill(core.process.process_id, signal.SIGKILL)
    assert "SIGKILL" in str(core.end())
    core.promote()  # too late, and no error


@pytest.mark.parametrize("moment", ["loading", "standing by", "half a promotion", "promoted"])
def test_the_end_of_its_parent_is_its_end_at_any_moment(
    moment: str, folder: Path, start_core: StartCore
) -> None:
    core = start_core("load waits" if moment == "loading" else None, is_standby=True)
    pipe = core.process._orders
    assert pipe is not None
    if moment == "loading":
        reached = core.folder.with_name(f"{core.folder.name}.gate.reached")
        assert in_time(reached.exists)
    else:
        assert core.standing_by.wait(PATIENCE_S)
    if moment == "half a promotion":
        pipe.write(struct.pack("<I", 300) + b"half")
        pipe.flush()
    if moment == "promoted":
        core.promote()
        assert in_time(lambda: "engine.sock" in files_in(core.folder))
    pipe.close()
    assert in_time(lambda: is_gone(core.process.process_id), seconds=2)
    assert core.folder.exists() == (moment != "promoted")


def test_the_end_of_the_parent_is_not_kept_waiting_by_imports(folder: Path) -> None:
    """Libraries that are loaded hold the interpreter's lock, and so does unpacking of code."""
    config = EngineArgs(model=str(folder)).core_config(f"ipc://{folder}/engine.sock")
    packed = msgspec.msgpack.encode(config)
    process = subprocess.Popen(
        [sys.executable, "-m", "footplate.backend.main"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(struct.pack("<I", len(packed)) + packed)
    process.stdin.flush()

    def has_begun_to_import_torch() -> bool:
        return "libtorch_cpu" in maps_of(process.pid)

    assert in_time(has_begun_to_import_torch)
    closed = time.monotonic()
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0
    assert time.monotonic() - closed < 2
    assert files_in(folder) == []


async def test_a_promoted_standby_of_a_real_model_says_what_the_first_core_said(
    start_core: StartCore, shared: SharedMemory
) -> None:
    options = {"model": "demo", "quantization": "int8", "num_gpu_blocks_override": 64}
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, logprobs=5, ignore_eos=True)
    prompt = list(range(20, 50))

    async def ask(address: str) -> list[Any]:
        engine = AsyncLLMEngine.connect(address)
        outputs = [output async for output in engine.generate(prompt, params)]
        engine.shutdown()
        return [outputs[-1].outputs[0].token_ids, repr(outputs[-1].outputs[0].logprobs)]

    first = start_core(shared=shared, **options)
    expected = await ask(first.address)
    standby = start_core(standby_of=first, shared=shared, **options)
    os.kill(first.process.process_id, signal.SIGKILL)
    first.end()
    # Still loading: until it is promoted that would take long on a machine that is busy.
    standby.promote(has_crashed=True)
    assert await ask(first.address) == expected
    assert "memfd:footplate-weights" in maps_of(standby.process.process_id)
