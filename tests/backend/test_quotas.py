"""What the clients with one key may have in the core together."""

import json
from pathlib import Path

import msgspec
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.roles import Peer
from footplate.backend.runner.fake import FakeModelRunner
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import AbortRequests, AddRequest, ErrorKind, Finished
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 5, 0, ())
ALICE = Peer(key="a" * 40, name="alice", role="generate", max_requests=3, max_queued_tokens=10)
BOB = Peer(key="b" * 40, name="bob", role="generate")
FIRST, SECOND, OTHER = b"alice 1", b"alice 2", b"bob"


class Driver:
    """A core with two connections of one key that has limits, and one of a key that has none."""

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
        cache = CacheConfig(block_size=4, num_gpu_blocks_override=64)
        runner = FakeModelRunner(ModelConfig(model="fake", max_model_len=40), cache, folder)
        self.core = EngineCore(runner, cache, SchedulerConfig(max_num_seqs=2), 1, lambda: 0.0)
        for client, peer in ((FIRST, ALICE), (SECOND, ALICE), (OTHER, BOB)):
            self.core.join(client, b"", peer)

    def add(self, client: bytes, handle: int, prompt: int = 2, **fields: object) -> None:
        message = AddRequest(handle, [20] * prompt, PARAMS)
        self.core.handle(client, msgspec.structs.replace(message, **fields))

    def ends(self) -> dict[tuple[bytes, int], Finished]:
        self.core.check_ledger()
        return {
            (client, end.handle): end
            for client, outputs in self.core.take_outputs()
            for end in outputs.finished
        }

    def step(self) -> dict[tuple[bytes, int], Finished]:
        self.core.step()
        return self.ends()

    def run(self) -> dict[tuple[bytes, int], Finished]:
        ends = self.ends()
        while self.core.has_work:
            ends |= self.step()
        return ends


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def is_overflow(end: Finished) -> bool:
    return end.kind is ErrorKind.OVERFLOW and "this key" in end.message


def test_requests_of_all_connections_count_and_those_of_other_keys_do_not(driver: Driver) -> None:
    for handle in range(2):
        driver.add(FIRST, handle)
    driver.add(SECOND, 0)
    for handle in range(20):
        driver.add(OTHER, handle)
    driver.add(SECOND, 1)
    driver.add(FIRST, 2)
    refused = {key for key, end in driver.run().items() if is_overflow(end)}
    assert refused == {(SECOND, 1), (FIRST, 2)}


def test_a_request_that_has_ended_makes_room_however_it_ended(driver: Driver) -> None:
    for _ in range(3):
        for handle in range(3):
            driver.add(FIRST, handle)
        assert not driver.ends()
        driver.core.handle(FIRST, AbortRequests([0]))  # while it waits
        driver.step()
        driver.core.handle(FIRST, AbortRequests([1]))  # while it runs
        driver.run()
    for handle in range(3):
        driver.add(SECOND, handle)
    driver.core.leave(SECOND)
    for handle in range(3):
        driver.add(FIRST, handle)
    assert not any(map(is_overflow, driver.run().values()))


def test_siblings_count_each_and_their_prompt_once(driver: Driver) -> None:
    driver.add(FIRST, 0, n=4)
    assert all(map(is_overflow, driver.ends().values()))
    driver.add(FIRST, 10, prompt=10, n=3)
    assert not driver.ends()
    driver.add(FIRST, 20)
    assert is_overflow(driver.ends()[FIRST, 20])
    driver.run()
    driver.add(FIRST, 30, prompt=10, n=3)
    assert not any(map(is_overflow, driver.run().values()))


def test_tokens_count_until_the_first_step(driver: Driver) -> None:
    driver.add(FIRST, 0, prompt=10)
    driver.add(SECOND, 0, prompt=1)
    assert is_overflow(driver.ends()[SECOND, 0])
    driver.step()
    driver.add(SECOND, 1, prompt=10)
    driver.add(SECOND, 2, prompt=11)
    ends = driver.ends()
    assert set(ends) == {(SECOND, 2)} and "max_queued_tokens" in ends[SECOND, 2].message


def test_a_replay_may_queue_and_not_be_one_too_many(driver: Driver) -> None:
    for handle in range(3):
        driver.add(FIRST, handle, prompt=10, is_replay=True)
    assert not driver.ends()
    driver.add(FIRST, 3, prompt=1, is_replay=True)
    assert is_overflow(driver.ends()[FIRST, 3])


def test_a_client_without_limits_has_none(driver: Driver) -> None:
    for handle in range(50):
        driver.add(OTHER, handle, prompt=30)
    assert not any(map(is_overflow, driver.run().values()))
