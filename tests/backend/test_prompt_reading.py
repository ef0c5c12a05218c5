"""How much of a prompt is computed here, though the prefix cache may have it."""

from typing import Any

import pytest

from footplate.backend.prompt_reading import PromptReading
from footplate.backend.request import Request
from footplate.backend.step import ScoredRows, StepPlan, StepResult
from footplate.protocol.token_params import LogprobsRequest, TokenParams

PROMPT = list(range(10))


def begun(reading: PromptReading, **params: Any) -> Request:
    options = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, (), **params)
    request = Request(1, b"c", 1, PROMPT.copy(), len(PROMPT), options)
    reading.begin(request)
    return request


def scores(start: int | None, **more: Any) -> LogprobsRequest:
    return LogprobsRequest(num_prompt_logprobs=0, prompt_start=start or 0, **more)


@pytest.mark.parametrize(
    ("params", "num_scored"),
    [
        ({}, 10),
        ({"logprobs": LogprobsRequest(num_logprobs=0)}, 10),
        ({"logprobs": scores(0)}, 1),  # nothing stands before the first token
        ({"logprobs": scores(4)}, 4),
        ({"logprobs": scores(99)}, 10),
        ({"skip_reading_prefix_cache": True}, 0),
    ],
)
def test_what_is_wanted_of_a_prompt_is_computed_here(
    params: dict[str, Any], num_scored: int
) -> None:
    assert begun(PromptReading(3), **params).num_scored == num_scored


def test_rows_that_are_scored_are_few_at_a_time_and_others_are_not() -> None:
    reading = PromptReading(3)
    scored, unread, plain = (
        begun(reading, logprobs=scores(4)),
        begun(reading, skip_reading_prefix_cache=True),
        begun(reading),
    )
    assert [reading.limit(request, 8) for request in (scored, unread, plain)] == [3, 8, 8]
    scored.num_scored = len(PROMPT)
    assert reading.limit(scored, 8) == 8


def test_a_step_counts_what_it_told_and_what_nobody_wanted_told() -> None:
    reading = PromptReading(3)
    scored = begun(reading, logprobs=scores(4))
    unread = begun(reading, skip_reading_prefix_cache=True)
    for request in (scored, unread):
        reading.limit(request, 3)
        request.num_computed_tokens = 6
    plan = StepPlan(requests=[scored, unread], num_new_tokens=[3, 6])
    rows = ScoredRows(4, [1, 1], b"", b"")
    reading.count(plan, StepResult([], prompt_logprobs={0: rows}))
    assert (scored.num_scored, unread.num_scored) == (6, 6)
    unread.num_computed_tokens = 12  # it has output by now
    reading.count(plan, StepResult([]))
    assert (scored.num_scored, unread.num_scored) == (6, 10)
    reading.begin_plan()
    unread.num_scored = 0
    reading.count(plan, StepResult([]))
    assert unread.num_scored == 0, "it is not in this plan"
