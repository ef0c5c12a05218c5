"""Who took part in the step in which a core ended, as the next one reads it."""

import os
import random
import stat
from itertools import product
from pathlib import Path

import pytest
from msgspec.structs import replace

from footplate.backend.engine_core import EngineCore
from footplate.backend.flight_recorder import (
    FlightRecorder,
    RecordedRunner,
    Suspects,
    digest_session,
    read_suspects,
    suspects_of,
)
from footplate.backend.request import Request
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.step import StepPlan, StepResult
from footplate.backend.step_guard import StepGuard
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, ())
ALICE, BOB, STRANGER = b"alice", b"bob", b"stranger"
SESSIONS = {ALICE: b"A" * 16, BOB: b"B" * 16, STRANGER: b""}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock.steps"


def record(path: Path | None, num_slots: int = 8) -> FlightRecorder:
    recorder = FlightRecorder(path, num_slots)
    for client, session in SESSIONS.items():
        recorder.join(client, session)
    return recorder


def request(handle: int, client: bytes = ALICE) -> Request:
    return Request(handle, client, handle, [1, 2], 2, PARAMS)


def suspects(path: Path) -> dict[bytes, list[int]]:
    found = read_suspects(path)
    return {name: suspects_of(session, found) for name, session in SESSIONS.items()}


NOBODY: dict[bytes, list[int]] = {ALICE: [], BOB: [], STRANGER: []}


def test_every_session_is_told_its_own_requests(path: Path) -> None:
    record(path).note(StepPlan([request(1), request(2, BOB), request(7), request(9, STRANGER)]))
    assert suspects(path) == {ALICE: [1, 7], BOB: [2], STRANGER: []}
    assert suspects_of(b"C" * 16, read_suspects(path)) == []


def test_only_the_last_step_counts(path: Path) -> None:
    recorder = record(path)
    requests = [request(handle) for handle in range(8)]
    recorder.note(StepPlan(requests))
    recorder.note(StepPlan(requests[3:5]))
    assert suspects(path)[ALICE] == [3, 4]
    recorder.note(StepPlan(requests[4:]))
    assert suspects(path)[ALICE] == [4, 5, 6, 7]
    assert not recorder.is_clear
    recorder.clear()
    assert recorder.is_clear and suspects(path) == NOBODY
    recorder.note(StepPlan(requests[4:]))
    assert suspects(path)[ALICE] == [4, 5, 6, 7], "the same as before, and written again"


def test_handles_of_any_size_and_sign_are_written_down(path: Path) -> None:
    handles = [-(2**63), -1, 0, 2**63 - 1]
    record(path).note(StepPlan([request(handle) for handle in handles]))
    assert suspects(path)[ALICE] == handles


def test_requests_that_change_hands_are_told_to_the_new_ones(path: Path) -> None:
    recorder, moved = record(path), request(1)
    recorder.note(StepPlan([moved]))
    moved.client, moved.handle = BOB, 5
    recorder.renew()
    recorder.note(StepPlan([moved]))
    assert suspects(path) == {ALICE: [], BOB: [5], STRANGER: []}
    recorder.leave(BOB)
    recorder.note(StepPlan([moved]))
    assert suspects(path) == NOBODY
    recorder.leave(BOB)
    recorder.clear()
    assert recorder.is_clear


@pytest.mark.parametrize("seed", range(20))
def test_whoever_comes_goes_and_pauses_the_record_is_the_step(path: Path, seed: int) -> None:
    recorder, dice = record(path, num_slots=40), random.Random(seed)
    everybody = [request(handle) for handle in range(40)]
    running: list[Request] = []
    admitted: list[Request] = []
    released: list[int] = []
    for _ in range(80):
        for one in dice.sample(everybody, dice.choice([0, 1, 3, 40])):
            if one in running:
                running.remove(one)
                released.append(one.key)
            if one not in running and dice.random() < 0.7:
                running.insert(dice.randint(0, len(running)), one)
                admitted.append(one)
        match dice.choice(["all", "all", "all", "alone", "part"]):
            case "alone" if admitted and admitted[-1] in running:
                plan = StepPlan(admitted[-1:], released=released, admitted=admitted)
            case "part":  # of a step that raised
                recorder.note(StepPlan(list(running), released=released, admitted=admitted))
                plan = StepPlan(running[1:3])
            case _:
                plan = StepPlan(list(running), released=released, admitted=admitted)
        admitted, released = [], []
        recorder.note(plan)
        assert sorted(suspects(path)[ALICE]) == sorted(r.handle for r in plan.requests), seed


def test_a_scheduler_tells_the_recorder_who_came_and_went(path: Path) -> None:
    """With few blocks, so that requests are preempted, under both policies, and some alone."""
    is_right: list[bool] = []

    class Comparing(FakeModelRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            if plan.requests:
                expected = sorted(request.handle for request in plan.requests)
                is_right.append(sorted(suspects(path)[ALICE]) == expected)
            return super().execute(plan)

    for policy, seed in product(("fcfs", "priority"), range(5)):
        dice = random.Random(seed)
        cache = CacheConfig(block_size=4, num_gpu_blocks_override=16)
        runner = Comparing(ModelConfig(model="fake", max_model_len=40), cache, DEMO_MODEL)
        recorder = record(path)
        recorded = RecordedRunner(runner, recorder)
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16, policy=policy)  # type: ignore[arg-type]
        core = EngineCore(recorded, cache, config, 1, lambda: 0.0)
        core.join(ALICE)
        for handle in range(40):
            params = replace(PARAMS, max_tokens=dice.randint(1, 20))
            prompt = [20] * dice.randint(1, 15)
            priority, alone = dice.randint(0, 3), dice.random() < 0.2
            message = AddRequest(handle, prompt, params, priority=priority, run_alone=alone)
            core.handle(ALICE, message)
            for _ in range(dice.randint(0, 3)):
                core.step()
        while core.has_work:
            core.step()
            core.take_outputs()
        assert all(is_right), f"{policy}, seed {seed}"
        assert core.stats().num_preemptions > 0
        recorder.clear()
        assert recorder.is_clear


def test_the_file_is_private_does_not_grow_and_names_no_session(path: Path) -> None:
    recorder = record(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    size = path.stat().st_size
    recorder.note(StepPlan([request(handle) for handle in range(8)]))
    assert path.stat().st_size == size
    assert SESSIONS[ALICE] not in path.read_bytes()
    assert digest_session(SESSIONS[ALICE]) in path.read_bytes()


def test_a_core_that_ends_before_its_first_step_leaves_the_record_to_the_next(path: Path) -> None:
    record(path).note(StepPlan([request(3)]))
    heir = record(path, num_slots=100)
    assert not heir.is_clear
    heir.clear()  # it is idle, and has not run yet
    assert suspects(path)[ALICE] == [3]
    heir.note(StepPlan([request(4)]))
    assert suspects(path)[ALICE] == [4]


def test_a_core_for_fewer_requests_leaves_nothing_of_the_one_before(path: Path) -> None:
    record(path, num_slots=50).note(StepPlan([request(handle) for handle in range(50)]))
    heir = record(path, num_slots=2)
    heir.note(StepPlan([request(60)]))
    assert suspects(path)[ALICE] == [60]
    heir.clear()
    assert heir.is_clear


def test_without_a_folder_nothing_is_recorded() -> None:
    recorder = record(None)
    recorder.note(StepPlan([request(1)]))
    assert recorder.is_clear
    recorder.clear()
    assert read_suspects(None) == {}


def test_what_is_in_the_way_is_left_alone(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.symlink_to(precious)
    record(path).note(StepPlan([request(1)]))
    assert read_suspects(path) == {} and precious.read_text() == "precious"
    path.unlink()
    path.mkdir()
    record(path).note(StepPlan([request(1)]))
    assert read_suspects(path) == {}
    path.rmdir()
    os.mkfifo(path)  # nobody has the other end, and nobody waits for it
    record(path).note(StepPlan([request(1)]))
    assert read_suspects(path) == {}


def test_a_disk_without_room_costs_the_record_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    recorder = record(path)
    recorder.note(StepPlan([request(1)]))
    assert recorder.is_clear


@pytest.mark.parametrize("seed", range(5))
def test_what_is_torn_or_foreign_names_nobody_who_was_not_there(path: Path, seed: int) -> None:
    record(path).note(StepPlan([request(handle) for handle in range(8)]))
    whole, dice = path.read_bytes(), random.Random(seed)
    digest = digest_session(SESSIONS[ALICE])
    for _ in range(200):
        torn = bytearray(whole)
        match dice.randrange(3):
            case 0:
                del torn[dice.randrange(len(whole)) :]
            case 1:
                torn[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            case _:
                torn = bytearray(dice.randbytes(dice.randrange(300)))
        path.write_bytes(torn)
        found: Suspects = read_suspects(path)
        assert found.keys() <= {digest}, f"seed {seed}"
        assert set(found.get(digest, ())) <= set(range(8)), f"seed {seed}"


def test_a_step_that_is_run_in_parts_has_only_the_part_on_record(path: Path) -> None:
    recorder = record(path)
    seen: list[list[int]] = []

    class Failing(FakeModelRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            seen.append(suspects(path)[ALICE])
            if any(request.handle == 2 for request in plan.requests):
                raise ValueError("marked")
            return super().execute(plan)

    runner = Failing(ModelConfig(model="fake"), CacheConfig(), DEMO_MODEL)
    requests = [request(handle) for handle in range(4)]
    plan = StepPlan(requests, [2] * 4, [0, 1, 2, 3])
    StepGuard(RecordedRunner(runner, recorder)).execute(plan)
    assert seen == [[0, 1, 2, 3], [0, 1], [2], [3]]
