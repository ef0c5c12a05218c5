"""Who took part in the step in which a core ended, as the next one reads it."""

import os
import random
import stat
from pathlib import Path

import pytest

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
from footplate.backend.step import StepPlan
from footplate.backend.step_guard import StepGuard
from footplate.protocol.config import CacheConfig, ModelConfig
from footplate.protocol.token_params import TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, ())
ALICE, BOB, STRANGER = b"alice", b"bob", b"stranger"
SESSIONS = {ALICE: b"A" * 16, BOB: b"B" * 16, STRANGER: b""}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock.steps"


def record(path: Path | None, max_entries: int = 8) -> FlightRecorder:
    recorder = FlightRecorder(path, max_entries)
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
    record(path).note([request(1), request(2, BOB), request(7), request(9, STRANGER)])
    assert suspects(path) == {ALICE: [1, 7], BOB: [2], STRANGER: []}
    assert suspects_of(b"C" * 16, read_suspects(path)) == []


def test_only_the_last_step_counts(path: Path) -> None:
    recorder = record(path)
    requests = [request(handle) for handle in range(8)]
    recorder.note(requests)
    recorder.note(requests[3:5])
    assert suspects(path)[ALICE] == [3, 4]
    recorder.note(requests[4:])
    assert suspects(path)[ALICE] == [4, 5, 6, 7]
    assert not recorder.is_clear
    recorder.clear()
    assert recorder.is_clear and suspects(path) == NOBODY
    recorder.note(requests[4:])
    assert suspects(path)[ALICE] == [4, 5, 6, 7], "the same as before, and written again"


def test_handles_of_any_size_and_sign_are_written_down(path: Path) -> None:
    handles = [0, -1, 2**63 - 1, -(2**63)]
    record(path).note([request(handle) for handle in handles])
    assert suspects(path)[ALICE] == handles


def test_requests_that_change_hands_are_told_to_the_new_ones(path: Path) -> None:
    recorder, moved = record(path), request(1)
    recorder.note([moved])
    moved.client, moved.handle, moved.record = BOB, 5, b""
    recorder.renew()
    recorder.note([moved])
    assert suspects(path) == {ALICE: [], BOB: [5], STRANGER: []}
    recorder.leave(BOB)
    moved.record = b""
    recorder.note([moved])
    assert suspects(path) == NOBODY
    recorder.leave(BOB)
    recorder.clear()
    assert recorder.is_clear


def test_requests_come_and_go(path: Path) -> None:
    recorder = record(path)
    for handle in range(100):
        recorder.note([request(handle), request(handle + 1)])
        assert suspects(path)[ALICE] == [handle, handle + 1]


def test_the_file_is_private_does_not_grow_and_names_no_session(path: Path) -> None:
    recorder = record(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    size = path.stat().st_size
    recorder.note([request(handle) for handle in range(8)])
    assert path.stat().st_size == size
    assert SESSIONS[ALICE] not in path.read_bytes()
    assert digest_session(SESSIONS[ALICE]) in path.read_bytes()


def test_a_core_that_ends_before_its_first_step_leaves_the_record_to_the_next(path: Path) -> None:
    record(path).note([request(3)])
    heir = record(path, max_entries=100)
    assert not heir.is_clear
    heir.clear()  # it is idle, and has not run yet
    assert suspects(path)[ALICE] == [3]
    heir.note([request(4)])
    assert suspects(path)[ALICE] == [4]


def test_without_a_folder_nothing_is_recorded() -> None:
    recorder = record(None)
    recorder.note([request(1)])
    assert recorder.is_clear
    recorder.clear()
    assert read_suspects(None) == {}


def test_what_is_in_the_way_is_left_alone(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.symlink_to(precious)
    record(path).note([request(1)])
    assert read_suspects(path) == {} and precious.read_text() == "precious"
    path.unlink()
    path.mkdir()
    record(path).note([request(1)])
    assert read_suspects(path) == {}
    path.rmdir()
    os.mkfifo(path)  # nobody has the other end, and nobody waits for it
    record(path).note([request(1)])
    assert read_suspects(path) == {}


def test_a_disk_without_room_costs_the_record_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    recorder = record(path)
    recorder.note([request(1)])
    assert recorder.is_clear


@pytest.mark.parametrize("seed", range(5))
def test_a_torn_or_foreign_record_is_none(path: Path, seed: int) -> None:
    record(path).note([request(handle) for handle in range(8)])
    whole, dice = path.read_bytes(), random.Random(seed)
    for _ in range(200):
        torn = bytearray(whole)
        match dice.randrange(4):
            case 0:
                del torn[dice.randrange(16 + 8 * 16) :]
            case 1:
                torn[dice.randrange(16 + 8 * 16)] ^= 1 << dice.randrange(8)
            case 2:
                torn = bytearray(dice.randbytes(dice.randrange(300)))
            case _:
                torn[12:16] = dice.randbytes(4)
        path.write_bytes(torn)
        found: Suspects = read_suspects(path)
        assert found == {} or torn == whole, f"seed {seed}"


def test_a_step_that_is_run_in_parts_has_only_the_part_on_record(path: Path) -> None:
    recorder = record(path)
    seen: list[list[int]] = []

    class Failing(FakeModelRunner):
        def execute(self, plan: StepPlan):  # type: ignore[no-untyped-def]
            seen.append(suspects(path)[ALICE])
            if any(request.handle == 2 for request in plan.requests):
                raise ValueError("marked")
            return super().execute(plan)

    runner = Failing(ModelConfig(model="fake"), CacheConfig(), DEMO_MODEL)
    requests = [request(handle) for handle in range(4)]
    plan = StepPlan(requests, [2] * 4, [0, 1, 2, 3])
    StepGuard(RecordedRunner(runner, recorder)).execute(plan)
    assert seen == [[0, 1, 2, 3], [0, 1], [2], [3]]
    RecordedRunner(runner, recorder).execute(StepPlan(released=[1]))
    assert seen[-1] == [3], "a plan that computes nothing is no step"
