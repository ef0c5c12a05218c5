"""What a core says when it is ready, and how long its loop may sleep."""

import gc
import time
from dataclasses import dataclass, field
from math import inf
from typing import cast

import pytest

from footplate.backend.core_process import BACKLOG_RETRY_S, LONGEST_SLEEP_S, _patience, _start
from footplate.backend.engine_core import EngineCore
from footplate.backend.flight_recorder import FlightRecorder
from footplate.backend.inbox import Inbox
from footplate.backend.outbox import Outbox
from footplate.protocol.config import CoreConfig, ModelConfig, RequestConfig
from footplate.protocol.messages import AddRequest, ErrorKind, Message, Welcome
from footplate.protocol.token_params import TokenParams


@dataclass
class Core:
    has_work: bool
    seconds_to_deadline: float | None
    is_drained: bool = False


@dataclass
class Lanes:
    has_backlog: bool


@pytest.mark.parametrize(
    ("has_work", "has_backlog", "seconds_to_deadline", "patience_s"),
    [
        (True, True, 5.0, 0),
        (True, False, None, 0),
        (False, False, None, None),
        (False, True, None, BACKLOG_RETRY_S),
        (False, False, 5.0, 5.0),
        (False, False, 0.0, 0.0),
        (False, True, 5.0, BACKLOG_RETRY_S),
        (False, False, 1e308, LONGEST_SLEEP_S),
        (False, True, BACKLOG_RETRY_S / 2, BACKLOG_RETRY_S / 2),
    ],
)
def test_the_loop_sleeps_until_something_is_due(
    has_work: bool,
    has_backlog: bool,
    seconds_to_deadline: float | None,
    patience_s: float | None,
) -> None:
    core = cast(EngineCore, Core(has_work, seconds_to_deadline))
    assert _patience(core, cast(Outbox, Lanes(has_backlog))) == patience_s


@pytest.mark.parametrize(
    ("has_backlog", "seconds_to_deadline", "patience_s"),
    [
        (False, None, 0),
        (False, 5.0, 0),
        (True, inf, BACKLOG_RETRY_S),
        (True, 5.0, BACKLOG_RETRY_S),
        (True, BACKLOG_RETRY_S / 2, BACKLOG_RETRY_S / 2),
        (True, 0.0, 0.0),  # then it is answered, whoever has read
    ],
)
def test_a_drained_core_does_not_spin_while_a_client_has_still_to_read(
    has_backlog: bool, seconds_to_deadline: float | None, patience_s: float
) -> None:
    core = cast(EngineCore, Core(False, seconds_to_deadline, is_drained=True))
    assert _patience(core, cast(Outbox, Lanes(has_backlog))) == patience_s


@dataclass
class Announcements:
    said: list[Message] = field(default_factory=list)

    def announce(self, message: Message) -> None:
        self.said.append(message)

    def wake(self) -> None:
        raise AssertionError("nothing is compiled")


def test_the_core_tells_and_keeps_what_requests_may_ask_for() -> None:
    inbox = Announcements()
    requests = RequestConfig(max_num_queued_reqs=0, max_logprobs=7)
    config = CoreConfig(address="", model=ModelConfig(model="fake"), requests=requests)
    core = _start(config, cast(Inbox, inbox), FlightRecorder(None, 1), time.monotonic())
    gc.unfreeze()
    welcome = inbox.said[-1]
    assert isinstance(welcome, Welcome)
    assert welcome.requests == requests
    core.join(b"client")
    core.handle(b"client", AddRequest(1, [20], TokenParams(0.0, 1.0, 0, 0.0, 0, 1, 0, ())))
    [(_, outputs)] = core.take_outputs()
    assert [finished.kind for finished in outputs.finished] == [ErrorKind.OVERFLOW]
