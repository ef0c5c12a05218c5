"""A request that nobody reads holds nothing, keeps its place, and goes on exactly."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.fake import FakeModelRunner
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import (
    AddRequest,
    Finished,
    FinishReason,
    ParkRequests,
    ResetPrefixCache,
)
from footplate.protocol.token_params import Grammar, LogprobsRequest, TokenParams

from .flow_driver import ALICE, BOB, NUM_BLOCKS, FlowDriver, expected
from .test_grammars_in_the_core import ScriptedCompiler

LENGTH, ABORT, DEADLINE = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.DEADLINE


@pytest.fixture
def driver(tmp_path: Path) -> FlowDriver:
    return FlowDriver(tmp_path)


def test_a_parked_request_holds_nothing_and_goes_on_where_it_was(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [7] * 9, max_tokens=12)
    for _ in range(4):
        driver.step()
    driver.park(ALICE, 1)
    stats = driver.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_parked) == (0, 0, 1)
    assert stats.num_free_blocks == NUM_BLOCKS
    driver.run()  # the runner is told to let go, and then there is nothing to do
    assert driver.tokens(ALICE, 1) == expected([7] * 9, 4)
    driver.resume(ALICE, 1)
    driver.run()
    assert driver.tokens(ALICE, 1) == expected([7] * 9, 12)
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]
    assert len(driver.started(ALICE, 1)) == 1
    assert driver.stats().num_preemptions == 0
    driver.check_empty()


def test_what_it_has_computed_is_found_again_in_the_prefix_cache(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [7] * 9, max_tokens=12)
    for _ in range(4):
        driver.step()
    driver.park(ALICE, 1)
    driver.run()
    driver.resume(ALICE, 1)
    [request] = driver.core._live
    driver.step()
    assert request.num_computed_tokens == 13
    driver.core.leave(ALICE)


def test_others_take_its_place_and_are_told_what_they_would_be(tmp_path: Path) -> None:
    driver = FlowDriver(tmp_path, max_num_seqs=1)
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.add(BOB, 1, [2], max_tokens=5)
    driver.step()
    assert driver.tokens(BOB, 1) == []
    driver.park(ALICE, 1)
    driver.run()
    assert driver.tokens(BOB, 1) == expected([2], 5)
    driver.resume(ALICE, 1)
    driver.run()
    assert driver.tokens(ALICE, 1) == expected([1], 30)
    driver.check_empty()


def test_it_has_its_old_place_in_the_queue(tmp_path: Path) -> None:
    driver = FlowDriver(tmp_path, max_num_seqs=1)
    for handle in (1, 2, 3):
        driver.add(ALICE, handle, [handle], max_tokens=2)
    driver.park(ALICE, 1, 2)
    driver.step()  # the third
    driver.resume(ALICE, 2, 1)
    driver.run()
    order = [finished.handle for _, out in driver.outputs for finished in out.finished]
    assert order == [3, 1, 2]


def test_unknown_finished_and_doubled_handles_are_no_error(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1])
    driver.run()
    driver.add(ALICE, 2, [2])
    driver.add(BOB, 2, [2])
    driver.park(ALICE, 1, 2, 2, 99)
    driver.park(ALICE, 2)
    assert driver.stats().num_parked == 1, "and another's is not touched"
    driver.resume(ALICE, 1, 2, 2, 99)
    driver.resume(ALICE, 2)
    assert driver.stats().num_parked == 0
    driver.run()
    assert driver.tokens(ALICE, 2) == driver.tokens(BOB, 2) == expected([2], 3)


def test_a_parked_request_can_be_parked_again_and_again(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.add(ALICE, 2, [2], max_tokens=30)
    while driver.core.has_work:
        driver.step()
        driver.park(ALICE, 1)
        driver.step()
        driver.resume(ALICE, 1)
    assert driver.tokens(ALICE, 1) == expected([1], 30)
    assert driver.tokens(ALICE, 2) == expected([2], 30)
    driver.check_empty()


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_parked_request_can_be_aborted_before_and_after_its_first_step(
    driver: FlowDriver, num_steps: int
) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30)
    for _ in range(num_steps):
        driver.step()
    driver.park(ALICE, 1)
    driver.abort(ALICE, 1)
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ABORT)]
    driver.check_empty()


def test_a_client_that_leaves_takes_its_parked_requests_along(driver: FlowDriver) -> None:
    for handle in (1, 2):
        driver.add(ALICE, handle, [handle])
    driver.step()
    driver.park(ALICE, 1)
    driver.core.leave(ALICE)
    driver.run()
    driver.core.check_ledger()
    assert driver.core.stats().num_free_blocks == NUM_BLOCKS
    assert driver.core.stats().num_parked == 0


def test_deadlines_go_on_while_it_is_parked(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [1], deadline_s=5.0, max_tokens=30)
    driver.add(ALICE, 2, [2], ttft_deadline_s=5.0, max_tokens=30)
    driver.park(ALICE, 2)
    driver.step()
    driver.park(ALICE, 1)
    driver.run()
    assert driver.core.seconds_to_deadline == 5.0
    driver.clock.now += 5
    driver.step()
    assert driver.ends(ALICE, 1) == [Finished(1, DEADLINE)]
    assert driver.ends(ALICE, 2) == [Finished(2, DEADLINE)]
    driver.check_empty()


def test_a_replayed_request_can_be_parked_before_it_has_run(driver: FlowDriver) -> None:
    whole = expected([7, 8], 6)
    driver.add(ALICE, 1, [7, 8], prior_token_ids=whole[:2], max_tokens=6, is_replay=True)
    driver.park(ALICE, 1)
    driver.run()
    assert driver.outputs == []
    driver.resume(ALICE, 1)
    driver.run()
    assert driver.runs(ALICE, 1) == [(p, [whole[p]]) for p in (2, 3, 4, 5)]


def test_it_is_in_nobodys_way_to_reset_the_cache(driver: FlowDriver) -> None:
    driver.add(ALICE, 1, [7] * 9)
    driver.step()
    driver.park(ALICE, 1)
    reply = driver.core.handle(ALICE, ResetPrefixCache(1))
    assert reply is not None and reply.ok
    driver.resume(ALICE, 1)
    driver.run()
    assert driver.tokens(ALICE, 1) == expected([7] * 9, 3)


def test_under_the_priority_policy_it_is_readmitted_by_its_priority(tmp_path: Path) -> None:
    driver = FlowDriver(tmp_path, max_num_seqs=1, policy="priority")
    driver.add(ALICE, 1, [1], priority=0, max_tokens=6)
    driver.step()
    driver.park(ALICE, 1)
    driver.add(BOB, 1, [2], priority=5, max_tokens=6)
    driver.step()
    driver.resume(ALICE, 1)
    driver.step()
    assert len(driver.tokens(ALICE, 1)) == 2 and len(driver.tokens(BOB, 1)) == 1
    driver.run()
    assert driver.tokens(BOB, 1) == expected([2], 6)
    driver.check_empty()


# ---- siblings


def tokens_of_all(driver: FlowDriver, n: int) -> list[list[int]]:
    return [driver.tokens(ALICE, handle) for handle in range(1, 1 + n)]


@pytest.mark.parametrize("parked", [(1,), (2,), (1, 2), (1, 2, 3, 4), (4, 3, 2, 1)])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_one_of_n_is_parked_and_the_others_go_on(
    tmp_path: Path, parked: tuple[int, ...], num_steps: int
) -> None:
    # Its prompt takes three steps, during which the others are held.
    driver = FlowDriver(tmp_path, max_num_seqs=4, max_num_batched_tokens=4)
    driver.add(ALICE, 1, [7] * 9, n=4, max_tokens=6)
    for _ in range(num_steps):
        driver.step()
    driver.park(ALICE, *parked)
    driver.run()
    whole = expected([7] * 9, 6)
    for handle, tokens in enumerate(tokens_of_all(driver, 4), 1):
        assert (tokens == whole) == (handle not in parked)
    driver.resume(ALICE, *parked)
    driver.run()
    assert tokens_of_all(driver, 4) == [whole] * 4
    driver.check_empty()


def test_the_prompts_logprobs_are_told_by_another_when_the_first_is_parked(
    tmp_path: Path,
) -> None:
    driver = FlowDriver(tmp_path, max_num_seqs=4, max_num_batched_tokens=4)
    wanted = LogprobsRequest(num_logprobs=None, num_prompt_logprobs=0, prompt_start=0)
    driver.add(ALICE, 1, [7] * 9, n=2, logprobs=wanted)
    driver.step()
    driver.park(ALICE, 1)
    driver.run()
    driver.resume(ALICE, 1)
    driver.run()
    told = [(r.handle, r.position) for _, out in driver.outputs for r in out.prompt_logprobs]
    assert [handle for handle, _ in told] == sorted((h for h, _ in told)), "one after the other"
    assert {position for handle, position in told if handle == 2} >= {1}
    assert tokens_of_all(driver, 2) == [expected([7] * 9, 3)] * 2
    driver.check_empty()


def test_parking_ten_thousand_that_wait_for_each_other_ends_no_core(driver: FlowDriver) -> None:
    n = 10_000
    driver.add(ALICE, 1, [7] * 9, n=n)
    driver.park(ALICE, *range(2, n + 1))
    driver.park(ALICE, 1)
    driver.run()
    assert driver.stats().num_parked == n
    driver.resume(ALICE, 5)
    driver.run()
    assert driver.tokens(ALICE, 5) == expected([7] * 9, 3)
    driver.abort(ALICE, *range(1, n + 1))
    driver.run()
    driver.check_empty()


# ---- grammars


def test_a_request_whose_grammar_is_compiled_is_parked_when_it_is_ready(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    cache = CacheConfig(block_size=4, num_gpu_blocks_override=32)
    runner = FakeModelRunner(ModelConfig(model="fake", max_model_len=40), cache, tmp_path)
    compiler = ScriptedCompiler()
    core = EngineCore(runner, cache, SchedulerConfig(), 7, lambda: 0.0, grammars=compiler)
    core.join(ALICE)
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 2, 0, (), grammar=Grammar("g"))
    core.handle(ALICE, AddRequest(1, [1], params))
    core.handle(ALICE, AddRequest(2, [1], params))
    core.handle(ALICE, ParkRequests([1]))
    assert (core.stats().num_waiting, core.stats().num_parked) == (2, 0)
    compiler.finish("g")
    ended: list[Finished] = []
    for _ in range(4):
        core.step()
        core.check_ledger()
        ended += [end for _, out in core.take_outputs() for end in out.finished]
    assert [end.handle for end in ended] == [2]
    assert (core.stats().num_waiting, core.stats().num_parked) == (0, 1)
    core.leave(ALICE)
    core.check_ledger()


# ---- one reader asleep, many awake


def run_of(folder: Path, *, parked: bool) -> tuple[dict[int, list[tuple[int, int]]], Any]:
    """What 255 of 256 requests are told, by handle: at which step, which token."""
    driver = FlowDriver(folder, caching=False)
    driver.core.leave(BOB)
    big = msgspec.structs.replace(CacheConfig(), num_gpu_blocks_override=256 * 4, block_size=16)
    model = ModelConfig(model="fake", max_model_len=64)
    driver.core = EngineCore(
        FakeModelRunner(model, big, folder), big, SchedulerConfig(), 7, driver.clock
    )
    driver.core.join(ALICE)
    for handle in range(256):
        driver.add(ALICE, handle, [handle % 97, 3], max_tokens=20)
    told: dict[int, list[tuple[int, int]]] = {handle: [] for handle in range(256)}
    number = 0
    while driver.core.has_work:
        number += 1
        for _, out in driver.step():
            for handle, token_id in zip(out.handles, out.token_ids, strict=True):
                told[handle].append((number, token_id))
        if parked and number == 5:
            driver.park(ALICE, 0)
    return told, driver


def test_of_256_streams_255_do_not_notice_that_one_is_not_read(tmp_path: Path) -> None:
    plain, _ = run_of(tmp_path, parked=False)
    others, driver = run_of(tmp_path, parked=True)
    assert len(others[0]) == 5 and len(plain[0]) == 20
    del plain[0], others[0]
    assert others == plain, "the same tokens in the same steps"
    assert driver.core.stats().num_parked == 1
    driver.core.leave(ALICE)
    driver.core.check_ledger()
