"""A request with an id outlives its connection, for a while and within bounds."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.backend import delivery as delivery_module
from footplate.backend import detached as detached_module
from footplate.protocol.config import RequestConfig
from footplate.protocol.messages import (
    AddRequest,
    ControlReply,
    ErrorKind,
    Finished,
    FinishReason,
    Started,
)
from footplate.protocol.token_params import LogprobsRequest, TokenParams

from .flow_driver import NUM_BLOCKS, FlowDriver, expected

LENGTH, ABORT, ERROR = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
STOP = FinishReason.STOP
LEASE_S = 10.0
SESSION = b"session"
OLD, NEW = b"old", b"new"  # its connections


class SessionDriver(FlowDriver):
    def __init__(self, folder: Path, **options: Any) -> None:
        requests = RequestConfig(
            lease_s=LEASE_S, lease_bytes=options.pop("lease_bytes", 64 * 2**20)
        )
        super().__init__(folder, requests=requests, **options)
        self.core.join(OLD, SESSION)

    def reconnect(self) -> None:
        self.lose(OLD)
        self.core.join(NEW, SESSION)

    def assert_lost(self, client: bytes, handle: int) -> None:
        [end] = self.ends(client, handle)
        assert (end.reason, end.kind) == (ERROR, ErrorKind.LOST)
        assert "this session has no request of the id" in end.message
        assert self.tokens(client, handle) == [] and not self.attached(client)


@pytest.fixture
def driver(tmp_path: Path) -> SessionDriver:
    return SessionDriver(tmp_path)


def test_it_runs_on_without_its_client_and_is_told_whole_to_the_next_connection(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 5, [1, 2], max_tokens=8, request_id="a", priority=3)
    driver.step()
    driver.lose(OLD)
    for _ in range(3):
        driver.step()
    assert driver.core.stats().num_detached == 1
    driver.clock.now += 2
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 9, "a")
    assert driver.core.stats().num_detached == 0
    driver.run()
    [attached] = driver.attached(NEW)
    assert attached.handle == 9
    fields = {name: getattr(attached.request, name) for name in AddRequest.__struct_fields__}
    assert fields["handle"] == 5 and fields["prompt_token_ids"] == [1, 2]
    assert (fields["request_id"], fields["priority"], fields["age_s"]) == ("a", 3, 2.0)
    whole = expected([1, 2], 8)
    assert driver.runs(NEW, 9)[0] == (0, whole[:4]), "what there is comes at once"
    assert driver.tokens(NEW, 9) == whole
    assert driver.started(NEW, 9) == [Started(9, 0, 0.0, 0.0)]
    assert driver.ends(NEW, 9) == [Finished(9, LENGTH)]
    assert driver.runs(OLD, 5) == [(0, whole[:1])] and not driver.ends(OLD, 5)
    driver.check_empty()


def test_one_that_has_ended_meanwhile_is_told_with_its_end(driver: SessionDriver) -> None:
    driver.add(OLD, 5, [1, 2], request_id="a")
    driver.lose(OLD)
    driver.run()
    assert driver.core.stats().num_detached == 1
    driver.core.join(NEW, SESSION)
    for handle in (1, 2):  # as often as it likes
        driver.attach(NEW, handle, "a")
        driver.run()
        assert driver.runs(NEW, handle) == [(0, expected([1, 2], 3))]
        assert driver.ends(NEW, handle) == [Finished(handle, LENGTH)]
    driver.check_empty()


def test_one_whose_last_words_may_not_have_arrived_is_kept(driver: SessionDriver) -> None:
    driver.add(OLD, 5, [1, 2], request_id="a")
    driver.run()
    assert driver.ends(OLD, 5) == [Finished(5, LENGTH)]
    driver.reconnect()
    driver.attach(NEW, 1, "a")
    driver.run()
    assert driver.tokens(NEW, 1) == expected([1, 2], 3)


def test_one_that_has_not_started_starts_for_its_new_client(driver: SessionDriver) -> None:
    driver.add(OLD, 5, [1, 2], request_id="a")
    driver.reconnect()
    driver.attach(NEW, 1, "a")
    driver.run()
    assert driver.tokens(NEW, 1) == expected([1, 2], 3)
    assert len(driver.started(NEW, 1)) == 1
    assert len(driver.attached(NEW)) == 1


def test_prior_tokens_are_told_as_well(driver: SessionDriver) -> None:
    whole = expected([1, 2], 6)
    driver.add(OLD, 5, [1, 2], request_id="a", max_tokens=6, prior_token_ids=whole[:2])
    driver.step()
    driver.reconnect()
    driver.attach(NEW, 1, "a")
    driver.run()
    assert driver.attached(NEW)[0].request.prior_token_ids == whole[:2]
    assert driver.tokens(NEW, 1) == whole


def test_long_outputs_come_in_parts(driver: SessionDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "MAX_RUN_TOKENS", 4)
    driver.add(OLD, 5, [1], request_id="a", max_tokens=30)
    for _ in range(10):
        driver.step()
    driver.reconnect()
    driver.attach(NEW, 1, "a")
    driver.run()
    assert [len(run) for _, run in driver.runs(NEW, 1)][:4] == [4, 4, 2, 1]
    assert driver.tokens(NEW, 1) == expected([1], 30)
    assert len(driver.started(NEW, 1)) == 1


def test_requests_without_an_id_and_sessions_without_a_name_end_with_their_connection(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], max_tokens=30)
    driver.core.join(b"nameless")
    driver.add(b"nameless", 1, [1], max_tokens=30, request_id="a")
    driver.step()
    driver.lose(OLD)
    driver.lose(b"nameless")
    driver.run()
    assert driver.core.stats().num_free_blocks == NUM_BLOCKS
    assert driver.core.stats().num_detached == 0


def test_a_goodbye_ends_everything(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="ended")
    driver.run()
    driver.add(OLD, 2, [1], request_id="live", max_tokens=30)
    driver.step()
    driver.core.leave(OLD)
    driver.run()
    driver.core.join(NEW, SESSION)
    for handle, request_id in enumerate(("ended", "live")):
        driver.attach(NEW, handle, request_id)
        driver.step()
        driver.assert_lost(NEW, handle)
    driver.check_empty()


def test_a_goodbye_ends_what_the_session_had_not_attached_to(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.step()
    driver.reconnect()
    driver.step()
    driver.core.leave(NEW)
    driver.run()
    assert driver.core.stats().num_detached == 0
    driver.check_empty()


def test_what_its_client_has_aborted_is_not_kept(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.step()
    driver.abort(OLD, 1)
    driver.attach(OLD, 2, "a")
    driver.run()
    assert driver.ends(OLD, 1) == [Finished(1, ABORT)]
    driver.assert_lost(OLD, 2)
    driver.add(OLD, 3, [1], request_id="a")
    driver.run()
    assert driver.ends(OLD, 3) == [Finished(3, LENGTH)]


@pytest.mark.parametrize("is_attached", [True, False], ids=["attached to", "its own"])
def test_nor_is_what_had_ended_when_its_client_aborted_it(
    driver: SessionDriver, is_attached: bool
) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.add(OLD, 2, [1], request_id="b")
    driver.run()
    driver.reconnect()
    if is_attached:
        driver.attach(NEW, 7, "a")
        driver.run()
        handle = 7
    else:
        driver.add(NEW, 1, [1], request_id="a")  # in the place of what was kept
        driver.run()
        handle = 1
    driver.abort(NEW, handle, 2, 2**63, -1)  # of which 2 was the other connection's
    driver.attach(NEW, 8, "a")
    driver.attach(NEW, 9, "b")
    driver.run()
    assert [end.kind for end in driver.ends(NEW, 8)] == [ErrorKind.LOST]
    assert driver.tokens(NEW, 9) == expected([1], 3)


def test_a_handle_that_was_used_twice_ends_no_more_than_its_own_requests(
    driver: SessionDriver,
) -> None:
    for request_id in "ab":
        driver.add(OLD, 1, [1], request_id=request_id)
        driver.run()
    driver.add(OLD, 2, [1], request_id="a")  # what was kept makes way
    driver.run()
    driver.abort(OLD, 1)
    driver.abort(OLD, 1)
    for handle, request_id in enumerate("ab", 3):
        driver.attach(OLD, handle, request_id)
    driver.run()
    assert driver.tokens(OLD, 3) == expected([1], 3)
    assert driver.ends(OLD, 4)[0].kind is ErrorKind.LOST
    driver.core.leave(OLD)
    assert not driver.core._leases._told


def test_what_a_stop_string_has_ended_in_its_client_is_kept_like_that(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    for _ in range(4):
        driver.step()
    driver.abort(OLD, 1, have_ended=True)
    driver.run()
    assert driver.ends(OLD, 1) == [Finished(1, STOP)]
    driver.check_empty()
    driver.attach(OLD, 2, "a")  # in the same connection, and in the next
    driver.run()
    driver.reconnect()
    assert driver.core.stats().num_detached == 0
    driver.attach(NEW, 1, "a")
    driver.run()
    for client, handle in ((OLD, 2), (NEW, 1)):
        assert driver.runs(client, handle) == [(0, expected([1], 4))]
        assert driver.ends(client, handle) == [Finished(handle, STOP)]
        assert driver.started(client, handle) == [Started(handle, 0, 0.0, 0.0)]


def test_so_is_one_that_ended_in_a_client_which_had_attached_to_it(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.step()
    driver.park(OLD, 1)
    driver.lose(OLD)  # before it could say that this token was the last
    for _ in range(3):
        driver.step()
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.step()
    driver.abort(NEW, 1, have_ended=True)
    driver.lose(NEW)
    driver.core.join(OLD, SESSION)
    driver.attach(OLD, 5, "a")
    driver.run()
    assert driver.tokens(OLD, 5) == expected([1], 5)
    assert driver.ends(OLD, 5) == [Finished(5, STOP)]
    driver.check_empty()


def test_one_that_had_ended_before_its_client_said_so_stays_as_it_was(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.run()
    driver.abort(OLD, 1, have_ended=True)
    driver.attach(OLD, 2, "a")
    driver.run()
    assert driver.ends(OLD, 1) == [Finished(1, LENGTH)]
    assert driver.ends(OLD, 2) == [Finished(2, LENGTH)]
    assert driver.tokens(OLD, 2) == expected([1], 3)


def test_of_several_completions_the_others_go_on_and_nothing_is_kept(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1, 2], n=3, max_tokens=6)
    driver.step()
    driver.step()
    driver.abort(OLD, 2, have_ended=True)
    driver.run()
    assert [driver.ends(OLD, handle)[0].reason for handle in (1, 2, 3)] == [LENGTH, STOP, LENGTH]
    for handle in (1, 3):
        assert len(driver.tokens(OLD, handle)) == 6
    assert not driver.core._leases
    driver.check_empty()


@pytest.mark.parametrize("waits_s", [0.0, LEASE_S - 0.1, LEASE_S])
def test_what_has_ended_in_its_client_has_the_lease_time_too(
    driver: SessionDriver, waits_s: float
) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.step()
    driver.abort(OLD, 1, have_ended=True)
    driver.lose(OLD)
    driver.step()
    assert driver.core.seconds_to_deadline == LEASE_S
    driver.clock.now += waits_s
    driver.step()
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.step()
    if waits_s < LEASE_S:
        assert driver.tokens(NEW, 1) == expected([1], 1)
    else:
        driver.assert_lost(NEW, 1)


def test_handles_of_two_connections_may_be_the_same(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=9)
    driver.step()
    driver.reconnect()
    driver.add(NEW, 1, [2], request_id="b", max_tokens=9)
    driver.step()
    driver.attach(NEW, 2, "a")
    driver.run()
    assert driver.tokens(NEW, 1) == expected([2], 9)
    assert driver.tokens(NEW, 2) == expected([1], 9)
    driver.check_empty()


def test_an_attached_request_is_an_ordinary_one(driver: SessionDriver) -> None:
    for handle, request_id in enumerate("ab"):
        driver.add(OLD, handle, [handle], request_id=request_id, max_tokens=30)
    driver.step()
    driver.reconnect()
    for handle, request_id in enumerate("ab", 5):
        driver.attach(NEW, handle, request_id)
    driver.park(NEW, 6)
    driver.abort(NEW, 5)
    driver.run()
    assert driver.ends(NEW, 5) == [Finished(5, ABORT)]
    assert driver.stats().num_parked == 1
    driver.lose(NEW)  # and it is detached again, and read no worse than any other
    driver.run()
    driver.core.join(OLD, SESSION)
    driver.attach(OLD, 1, "b")
    driver.run()
    assert driver.runs(OLD, 1)[-1] == (0, expected([1], 30))
    driver.check_empty()


def test_an_unknown_id_is_lost_and_so_is_another_sessions(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.core.join(NEW, b"another")
    driver.core.join(b"nameless")
    driver.attach(NEW, 1, "a")
    driver.attach(b"nameless", 1, "a")
    driver.attach(OLD, 2, "b")
    driver.step()
    for client, handle in ((NEW, 1), (b"nameless", 1), (OLD, 2)):
        driver.assert_lost(client, handle)
    driver.abort(OLD, 1)
    driver.run()
    driver.check_empty()


@pytest.mark.parametrize("handle", [-1, 2**63])
def test_a_handle_that_is_none_is_refused(driver: SessionDriver, handle: int) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.attach(OLD, handle, "a")
    driver.run()
    assert [end.reason for end in driver.ends(OLD, handle)] == [ERROR]
    assert driver.ends(OLD, 1) == [Finished(1, LENGTH)]


def test_a_handle_in_use_gets_no_end_that_is_not_its_own(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.add(OLD, 2, [2])
    driver.attach(OLD, 2, "a")
    driver.run()
    assert driver.ends(OLD, 1) == [Finished(1, LENGTH)]
    assert driver.ends(OLD, 2) == [Finished(2, LENGTH)]
    assert not driver.attached(OLD)


def test_who_attaches_to_a_request_it_has_gets_it_under_its_new_handle(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=9)
    driver.step()
    driver.step()
    driver.attach(OLD, 2, "a")
    driver.run()
    assert driver.ends(OLD, 1) == [Finished(1, ABORT)]
    assert driver.tokens(OLD, 1) == expected([1], 2)
    assert driver.tokens(OLD, 2) == expected([1], 9)
    assert driver.ends(OLD, 2) == [Finished(2, LENGTH)]
    driver.check_empty()


# ---- what cannot have an id


def test_an_id_in_use_is_refused_and_free_again_when_its_request_has_ended(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.add(OLD, 2, [2], request_id="a")
    driver.add(OLD, 3, [2], request_id="a", is_replay=True)
    driver.run()
    for handle in (2, 3):
        [end] = driver.ends(OLD, handle)
        assert (end.reason, end.kind) == (ERROR, ErrorKind.INVALID)
        assert end.message == "request_id 'a' is in use by a request that goes on"
    assert driver.ends(OLD, 1) == [Finished(1, LENGTH)]
    driver.add(OLD, 4, [3], request_id="a")
    driver.run()
    driver.attach(OLD, 5, "a")
    driver.run()
    assert driver.tokens(OLD, 5) == expected([3], 3)


def test_a_replay_takes_the_place_of_what_runs_without_a_client(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=9)
    driver.step()
    driver.reconnect()
    driver.add(NEW, 1, [1], request_id="a", max_tokens=9)
    driver.add(
        NEW,
        2,
        [1],
        request_id="a",
        max_tokens=9,
        prior_token_ids=expected([1], 1),
        is_replay=True,
    )
    assert driver.core.stats().num_detached == 0
    driver.run()
    assert driver.ends(NEW, 1)[0].kind is ErrorKind.INVALID, "it is no replay"
    assert [run[0] for _, run in driver.runs(NEW, 2)] == expected([1], 9)[1:]
    driver.check_empty()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"n": 2}, "n is 2, with a request_id it must be 1"),
        ({"logprobs": LogprobsRequest(num_logprobs=0)}, "a request with a request_id cannot have"),
    ],
)
def test_what_is_more_than_tokens_cannot_have_an_id(
    driver: SessionDriver, options: dict[str, Any], why: str
) -> None:
    driver.add(OLD, 1, [1], request_id="a", **options)
    driver.run()
    [end] = driver.ends(OLD, 1)
    assert (end.reason, end.kind) == (ERROR, ErrorKind.INVALID) and why in end.message
    driver.lose(OLD)
    driver.check_empty()


def test_a_request_that_could_not_be_sent_back_is_refused(
    driver: SessionDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, ())
    size = len(msgspec.msgpack.encode(AddRequest(1, [1], params, request_id="a")))
    for limit, is_taken in ((size, True), (size - 1, False)):
        monkeypatch.setattr(detached_module, "MAX_REQUEST_BYTES", limit)
        driver.outputs.clear()
        driver.add(OLD, 1, [1], request_id="a")
        driver.run()
        assert (driver.ends(OLD, 1)[0].reason is LENGTH) == is_taken


# ---- for how long


def test_what_runs_without_a_client_is_ended_when_its_lease_is_over(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.step()
    driver.lose(OLD)
    driver.clock.now += LEASE_S - 0.1
    driver.step()
    assert driver.core.stats().num_running == 1
    assert driver.core.seconds_to_deadline == pytest.approx(0.1)
    driver.clock.now += 0.1
    driver.step()
    driver.check_empty()
    assert driver.core.seconds_to_deadline is None
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.step()
    driver.assert_lost(NEW, 1)


def test_what_has_ended_is_forgotten_when_its_lease_is_over(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a")
    driver.run()
    assert driver.core.seconds_to_deadline == LEASE_S
    driver.clock.now += 6
    driver.lose(OLD)
    assert driver.core.seconds_to_deadline == LEASE_S, "counted from when its connection went"
    driver.clock.now += LEASE_S
    driver.step()
    assert driver.core.stats().num_detached == 0
    assert driver.core.seconds_to_deadline is None
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.step()
    driver.assert_lost(NEW, 1)


def test_a_session_that_comes_back_has_the_lease_time_to_attach(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30)
    driver.add(OLD, 2, [1], request_id="b", max_tokens=1)
    driver.run()
    driver.lose(OLD)
    driver.clock.now += LEASE_S - 1
    driver.core.join(NEW, SESSION)
    driver.clock.now += LEASE_S - 1
    driver.step()
    driver.attach(NEW, 1, "a")
    driver.clock.now += 2
    driver.run()
    assert driver.tokens(NEW, 1) == expected([1], 30)
    driver.attach(NEW, 2, "b")
    driver.step()
    assert driver.ends(NEW, 2)[0].kind is ErrorKind.LOST


def test_deadlines_count_without_a_client(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=30, deadline_s=5.0)
    driver.step()
    driver.lose(OLD)
    driver.clock.now += 5
    driver.step()
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.run()
    assert driver.tokens(NEW, 1) == expected([1], 1)
    assert driver.ends(NEW, 1) == [Finished(1, FinishReason.DEADLINE)]
    driver.check_empty()


def test_a_parked_request_runs_on_when_its_client_is_gone(driver: SessionDriver) -> None:
    driver.add(OLD, 1, [1], request_id="a", max_tokens=9)
    driver.step()
    driver.park(OLD, 1)
    driver.lose(OLD)
    driver.run()
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "a")
    driver.run()
    assert driver.tokens(NEW, 1) == expected([1], 9)


def test_an_engine_that_drains_waits_for_them_and_ends_them_at_its_deadline(
    driver: SessionDriver,
) -> None:
    driver.add(OLD, 1, [1], request_id="short", max_tokens=5)
    driver.add(OLD, 2, [2], request_id="long", max_tokens=30)
    driver.step()
    driver.lose(OLD)
    driver.core.join(b"boss")
    driver.drain(b"boss", 1, timeout_s=3.0)
    for _ in range(10):
        driver.step()
    driver.core.join(NEW, SESSION)
    driver.attach(NEW, 1, "short")
    driver.attach(NEW, 2, "long")
    driver.step()
    assert driver.tokens(NEW, 1) == expected([1], 5)
    assert not [m for m in driver.replies if isinstance(m[1], ControlReply)]
    driver.clock.now += 3
    driver.run()
    assert driver.ends(NEW, 2) == [Finished(2, ABORT)]
    assert driver.replies[-1] == (b"boss", ControlReply(1, True))
    driver.check_empty()


# ---- how much


def test_the_first_that_ended_is_forgotten_when_a_session_keeps_too_much(tmp_path: Path) -> None:
    driver = SessionDriver(tmp_path, lease_bytes=300)
    for handle in range(12):
        driver.add(OLD, handle, [1] * 20, request_id=f"{handle}")
        driver.run()
    driver.reconnect()
    for handle in range(12):
        driver.attach(NEW, handle, f"{handle}")
    driver.run()
    kept = [handle for handle in range(12) if driver.tokens(NEW, handle)]
    assert 1 < len(kept) < 8
    assert kept == list(range(12 - len(kept), 12))


def test_what_has_ended_in_its_client_counts_as_well(tmp_path: Path) -> None:
    driver = SessionDriver(tmp_path, lease_bytes=300)
    for handle in range(12):
        driver.add(OLD, handle, [1] * 20, request_id=f"{handle}", max_tokens=20)
        driver.step()
        driver.abort(OLD, handle, have_ended=True)
    assert driver.core._leases._sessions[SESSION].num_bytes <= 300
    driver.reconnect()
    for handle in range(12):
        driver.attach(NEW, handle, f"{handle}")
    driver.run()
    kept = [handle for handle in range(12) if driver.tokens(NEW, handle)]
    assert 1 < len(kept) < 8
    assert kept == list(range(12 - len(kept), 12))


def test_one_that_runs_without_a_client_and_keeps_too_much_is_ended(tmp_path: Path) -> None:
    driver = SessionDriver(tmp_path, lease_bytes=200)
    driver.add(OLD, 1, [1], request_id="ended")
    driver.run()
    driver.add(OLD, 2, [2], request_id="a", max_tokens=38)
    driver.add(OLD, 3, [3], max_tokens=38)
    driver.step()
    driver.lose(OLD)
    driver.run()
    driver.core.join(NEW, SESSION)
    for handle, request_id in enumerate(("ended", "a")):
        driver.attach(NEW, handle, request_id)
    driver.run()
    assert driver.ends(NEW, 0)[0].kind is driver.ends(NEW, 1)[0].kind is ErrorKind.LOST
    driver.check_empty()
    driver.add(NEW, 7, [2], request_id="a", max_tokens=38)
    driver.run()
    assert driver.tokens(NEW, 7) == expected([2], 38), "with a client it may be as long as it is"


def test_one_session_does_not_cost_another_what_it_keeps(tmp_path: Path) -> None:
    driver = SessionDriver(tmp_path, lease_bytes=120)
    driver.core.join(b"other", b"another")
    driver.add(b"other", 1, [1], request_id="a")
    driver.run()
    for handle in range(5):
        driver.add(OLD, handle, [1], request_id=f"{handle}")
        driver.run()
    driver.attach(b"other", 2, "a")
    driver.run()
    assert driver.tokens(b"other", 2) == expected([1], 3)


def test_nothing_is_left_of_sessions_that_are_over(driver: SessionDriver) -> None:
    for number in range(20):
        client = b"%d" % number
        driver.core.join(client, b"session %d" % number)
        driver.add(client, 1, [1], request_id="a", max_tokens=3 + number % 30)
        driver.step()
        driver.lose(client)
    driver.run()
    driver.lose(OLD)
    driver.clock.now += LEASE_S
    driver.run()
    driver.step()
    core = driver.core
    assert not core._leases and not core._leases._sessions
    assert not list(core._live)
    assert len(core._scheduler._waiting._lines) == 0
    driver.check_empty()


# ---- whose share


def test_a_session_has_one_share_whatever_its_connections(tmp_path: Path) -> None:
    driver = SessionDriver(tmp_path, max_num_seqs=1)
    driver.core.join(b"other")
    driver.add(OLD, 1, [1], request_id="a", max_tokens=38)
    driver.add(b"other", 1, [2], max_tokens=20)
    driver.add(b"other", 2, [2], max_tokens=20)
    driver.step()
    driver.reconnect()
    driver.attach(NEW, 1, "a")
    driver.add(NEW, 2, [1])
    driver.run()
    order = [(c, end.handle) for c, out in driver.outputs for end in out.finished]
    assert order == [(NEW, 1), (b"other", 1), (b"other", 2), (NEW, 2)], (
        "who has had 38 tokens waits for who has had 20"
    )
    driver.check_empty()
