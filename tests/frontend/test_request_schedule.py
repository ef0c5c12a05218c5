"""What is refused of a request's schedule, before anything is sent."""

import math
from typing import Any

import pytest

from footplate.frontend.request_schedule import RequestSchedule
from footplate.protocol.errors import InvalidParameterError, InvalidRequestError
from footplate.protocol.messages import Limits


def limits(policy: str) -> Limits:
    return Limits(8, 64, policy, 16, 100, True)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("illegal", [None, "", [], 0.0, False, True, 1.5, "1", 2**31, math.nan])
def test_a_priority_that_is_no_integer_is_refused_under_any_policy(
    policy: str, illegal: Any
) -> None:
    RequestSchedule(priority=0).check(limits(policy))
    with pytest.raises(InvalidParameterError, match="priority="):
        RequestSchedule(priority=illegal).check(limits(policy))


def test_priorities_need_their_policy() -> None:
    for priority in (1, -(2**31), 2**31 - 1):
        RequestSchedule(priority).check(limits("priority"))
        with pytest.raises(InvalidRequestError, match="scheduling_policy='priority'"):
            RequestSchedule(priority).check(limits("fcfs"))


@pytest.mark.parametrize("name", ["arrival_time", "ttft_deadline_s", "deadline_s"])
@pytest.mark.parametrize("illegal", ["", "1", True, -1, math.nan, math.inf, 10**400])
def test_times_are_finite_numbers(name: str, illegal: Any) -> None:
    def check(value: Any) -> None:
        RequestSchedule(**{name: value}).check(limits("fcfs"))

    check(1)
    check(1e308)
    with pytest.raises(InvalidParameterError, match=f"{name}="):
        check(illegal)
