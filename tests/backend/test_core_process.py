"""How long the busy loop may sleep."""

from dataclasses import dataclass
from typing import cast

import pytest

from footplate.backend.core_process import BACKLOG_RETRY_S, _patience
from footplate.backend.engine_core import EngineCore
from footplate.backend.outbox import Outbox


@dataclass
class Core:
    has_work: bool
    seconds_to_deadline: float | None


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
