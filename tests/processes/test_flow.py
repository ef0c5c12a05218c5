"""Flow between real processes: clients that stop, die and come back, and a core that is to end."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import psutil
import pytest

from footplate.protocol.links import new_client_id
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
    AttachRequest,
    ControlReply,
    CoreMessage,
    Drain,
    EngineStopping,
    ErrorKind,
    Finished,
    FinishReason,
    Goodbye,
    ParkRequests,
    Progress,
    Refused,
    ResumeRequests,
    StepOutputs,
    Welcome,
)
from footplate.protocol.token_params import TokenParams

from .conftest import HERE, PATIENCE_S, Program, StartCore, in_time
from .raw_client import RawClient
from .test_core_process import PROMPT

GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 30_000, 0, ())
SHORT = TokenParams(0.0, 1.0, 0, 0.0, 0, 50, 0, ())
SESSION = b"the session"


class Told:
    """What one raw client has been told."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished] = {}
        self.others: list[CoreMessage] = []

    def hear(self) -> None:
        """One message; tokens of a handle must follow each other."""
        message = self._client.hear_output()
        if not isinstance(message, StepOutputs):
            self.others.append(message)
            return
        start = 0
        counts = message.counts or [1] * len(message.handles)
        for handle, position, count in zip(message.handles, message.positions, counts, strict=True):
            tokens = self.tokens.setdefault(handle, [])
            assert position == len(tokens)
            tokens += message.token_ids[start : start + count]
            start += count
        for end in message.finished:
            assert end.handle not in self.ends, "two ends"
            self.ends[end.handle] = end

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "the core says other things"
            self.hear()


@contextmanager
def session_client(address: str, session: bytes = SESSION) -> Iterator[RawClient]:
    client = RawClient(address, new_client_id())
    client.say(client.hello(session))
    while not isinstance(answer := client.hear(), Welcome):
        assert isinstance(answer, Progress)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def whole(address: str, params: TokenParams = SHORT) -> Iterator[tuple[RawClient, list[int]]]:
    """A witness, and all tokens of a request, from a core that holds nothing."""
    with session_client(address, b"") as client:
        told = Told(client)
        client.say(AddRequest(1, PROMPT, params))
        told.until(lambda: told.ends)
        yield client, told.tokens[1]


def check_empty(witness: RawClient, welcome_blocks: int) -> None:
    """Nothing is left, at the latest in a moment."""

    def is_empty() -> bool:
        stats = witness.stats()
        return (
            stats.num_running == stats.num_waiting == stats.num_parked == 0
            and stats.num_free_blocks == welcome_blocks
        )

    assert in_time(is_empty)


def num_blocks(client: RawClient) -> int:
    client.say(client.hello())
    welcome = client.hear()
    assert isinstance(welcome, Welcome)
    return welcome.limits.num_kv_blocks


# ---- clients that stop


def test_a_client_process_that_is_stopped_costs_its_budget_and_is_dismissed(
    run: Callable[..., Program], start_core: StartCore
) -> None:
    core = start_core(max_unread_bytes=2**20)
    with whole(core.address) as (witness, tokens):
        before = psutil.Process(core.process.process_id).memory_info().rss
        program = run(HERE / "client_program.py", "attached", core.address)
        program.line_with("streaming")
        program.signal(signal.SIGSTOP)
        assert in_time(lambda: witness.stats().num_running == 0, seconds=30)
        grown = psutil.Process(core.process.process_id).memory_info().rss - before
        assert grown < 32 * 2**20, f"{grown} bytes"
        check_empty(witness, num_blocks(witness))
        assert witness.stats().num_generation_tokens < 20 * 30_000, "they were aborted"
        told = Told(witness)
        witness.say(AddRequest(5, PROMPT, SHORT))
        told.until(lambda: told.ends)
        assert told.tokens[5] == tokens
        program.signal(signal.SIGCONT)


def test_a_parked_request_goes_on_exactly(start_core: StartCore) -> None:
    core = start_core()
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 3_000, 0, ())
    with whole(core.address, params) as (witness, tokens), session_client(core.address) as client:
        told = Told(client)
        client.say(AddRequest(1, PROMPT, params), ParkRequests([1]))
        client.say(AddRequest(2, PROMPT, params))
        told.until(lambda: 2 in told.ends)
        assert told.tokens.keys() == {2}
        assert witness.stats().num_parked == 1
        client.say(ResumeRequests([1]))
        told.until(lambda: 1 in told.ends)
        assert told.tokens[1] == told.tokens[2] == tokens
        check_empty(witness, num_blocks(witness))


# ---- clients that die and come back


@pytest.mark.parametrize("num_seen", [1, 20])
def test_a_request_with_an_id_outlives_its_connection(start_core: StartCore, num_seen: int) -> None:
    core = start_core()
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 5_000, 0, ())
    with whole(core.address, params) as (witness, tokens):
        num_heard = witness.stats().num_prompt_tokens + 2 * len(PROMPT)
        with session_client(core.address) as client:
            told = Told(client)
            client.say(AddRequest(7, PROMPT, params, request_id="mine"))
            client.say(AddRequest(8, PROMPT, GREEDY))
            told.until(lambda: len(told.tokens.get(7, ())) >= num_seen)
            # What has not left a process dies with it.
            assert in_time(lambda: witness.stats().num_prompt_tokens == num_heard)
        # Its sockets are closed, as by the kernel when a process is killed.
        assert in_time(lambda: witness.stats().num_detached == 1)
        assert in_time(lambda: witness.stats().num_running <= 1), "the other one is aborted"
        with session_client(core.address) as client:
            told = Told(client)
            client.say(AttachRequest(3, "mine"), AttachRequest(4, "unknown"))
            client.say(msgspec.msgpack.encode(["attach", 5, None]))
            told.until(lambda: told.ends.keys() == {3, 4, 5})
            assert told.ends[5].kind is ErrorKind.INVALID
            [attached] = told.others
            assert isinstance(attached, Attached)
            assert (attached.handle, attached.request.handle) == (3, 7)
            assert attached.request.prompt_token_ids == PROMPT
            assert told.tokens == {3: tokens}
            assert told.ends[3] == Finished(3, FinishReason.LENGTH)
            assert told.ends[4].kind is ErrorKind.LOST
            client.say(Goodbye())
            assert in_time(lambda: witness.stats().num_detached == 0)
        check_empty(witness, num_blocks(witness))


def test_a_session_that_comes_back_before_it_was_missed_takes_the_place_of_its_old_connection(
    start_core: StartCore,
) -> None:
    core = start_core()
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 20_000, 0, ())
    with (
        whole(core.address, params) as (witness, tokens),
        session_client(core.address) as old,
    ):
        old_told = Told(old)
        old.say(AddRequest(1, PROMPT, params, request_id="mine"), AddRequest(2, PROMPT, GREEDY))
        old_told.until(lambda: len(old_told.tokens) == 2)
        with session_client(core.address) as new:
            refusal = old.hear()
            assert isinstance(refusal, Refused) and refusal.kind == "superseded"
            told = Told(new)
            new.say(AttachRequest(1, "mine"))
            told.until(lambda: told.ends)
            assert told.tokens == {1: tokens}
            assert witness.stats().num_running == 0, "what has no id went with the connection"
            old.say(AbortRequests([1]))
            new.say(AddRequest(2, PROMPT, SHORT))
            told.until(lambda: 2 in told.ends)
            assert told.tokens[2] == tokens[:50]
        check_empty(witness, num_blocks(witness))


# ---- a core that is to end


def test_a_core_drains_and_says_so(start_core: StartCore) -> None:
    core = start_core()
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 3_000, 0, ())
    with whole(core.address, params) as (boss, tokens), session_client(core.address) as client:
        told, boss_told = Told(client), Told(boss)
        client.say(AddRequest(1, PROMPT, params))
        told.until(lambda: told.tokens)
        boss.say(Drain(7), AddRequest(5, PROMPT, SHORT))
        boss_told.until(lambda: boss_told.ends)
        assert boss_told.ends[5].kind is ErrorKind.DRAINING
        assert not boss_told.others, "the other client has not been told all"
        told.until(lambda: told.ends)
        assert told.tokens[1] == tokens
        boss_told.until(lambda: boss_told.others)
        assert boss_told.others == [ControlReply(7, True)]
        check_empty(boss, num_blocks(boss))


def test_a_sleeping_core_wakes_at_the_end_of_its_drain(start_core: StartCore) -> None:
    core = start_core()
    with whole(core.address) as (witness, _), session_client(core.address) as client:
        told, drained = Told(client), Told(witness)
        client.say(AddRequest(1, PROMPT, GREEDY), ParkRequests([1]))
        assert in_time(lambda: witness.stats().num_parked == 1)
        since = time.monotonic()
        witness.say(Drain(1, 0.2))
        drained.until(lambda: drained.others)
        assert 0.2 <= time.monotonic() - since < 2
        told.until(lambda: told.ends)
        assert told.ends == {1: Finished(1, FinishReason.ABORT)}
        check_empty(witness, num_blocks(witness))


def test_a_core_that_ends_behind_a_drain_tells_its_clients_that_no_other_will_come(
    start_core: StartCore,
) -> None:
    core = start_core()
    with session_client(core.address) as busy, session_client(core.address, b"") as idle:
        told, idle_told = Told(busy), Told(idle)
        busy.say(AddRequest(1, PROMPT, GREEDY), ParkRequests([1]))
        assert in_time(lambda: idle.stats().num_parked == 1)
        idle.say(Drain(1, 3600.0))
        assert idle.stats().num_parked == 1, "the drain has been heard"
        os.kill(core.process.process_id, signal.SIGTERM)
        for each in (told, idle_told):
            while not each.others:
                each.hear()
            [last] = each.others
            assert isinstance(last, EngineStopping)
            assert last.reason == "the engine was told to end"
        assert "143" in str(core.end())


def test_who_waits_for_a_start_hears_that_there_will_be_none(start_core: StartCore) -> None:
    core = start_core("load waits")
    client = RawClient(core.address)
    try:
        client.say(client.hello())
        assert isinstance(client.hear(), Progress)
        os.kill(core.process.process_id, signal.SIGTERM)
        while isinstance(answer := client.hear(), Progress):
            pass
        assert isinstance(answer, Refused)
        assert (answer.kind, answer.reason) == ("start", "the engine was told to end")
    finally:
        client.close()
