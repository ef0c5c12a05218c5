"""What is done for whom, and which prompt positions are scored."""

from typing import Any

import pytest

from footplate.backend.logits.wanted import is_special, max_scored_rows, prompt_positions
from footplate.protocol.token_params import LogprobsRequest

from .builders import SetGrammar, make_request


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 3, "stop_token_ids": (1,)}, False),
        ({"min_tokens": 3}, True),
        ({"min_tokens": 2}, False),
        ({"presence_penalty": 1.0}, True),
        ({"logprobs": LogprobsRequest(0)}, True),
        ({"logprobs": LogprobsRequest(None, (3,))}, True),
        ({"logprobs": LogprobsRequest(None, (), 5)}, False),
        ({"grammar": SetGrammar({1})}, True),
    ],
)
def test_only_requests_that_ask_for_more_are_special(fields: Any, expected: bool) -> None:
    assert is_special(make_request([0], [1, 2], **fields)) is expected


def positions(start: int, end: int, num_scored: int = 0, **fields: Any) -> list[int]:
    request = make_request(range(10), [1, 2], logprobs=LogprobsRequest(None, (), **fields))
    request.num_scored = num_scored
    return list(prompt_positions(request, start, end))


def test_every_prompt_token_but_the_first_is_scored_by_the_row_before_it() -> None:
    assert positions(0, 4, num_prompt_logprobs=0) == [1, 2, 3, 4]
    assert positions(4, 9, num_prompt_logprobs=0) == [5, 6, 7, 8, 9]
    assert positions(9, 10, num_prompt_logprobs=0) == []
    assert positions(0, 1, prompt_token_ids=(3,)) == [1]


def test_output_behind_the_prompt_is_not_scored() -> None:
    assert positions(0, 12, num_prompt_logprobs=-1) == list(range(1, 10))
    assert positions(10, 12, num_prompt_logprobs=-1) == []


def test_positions_before_the_start_and_those_told_already_are_not_scored() -> None:
    assert positions(0, 10, num_prompt_logprobs=0, prompt_start=7) == [7, 8, 9]
    assert positions(0, 10, num_scored=8, num_prompt_logprobs=0) == [8, 9]
    assert positions(0, 10, num_scored=10, num_prompt_logprobs=0) == []
    assert positions(0, 4, num_scored=8, num_prompt_logprobs=0) == []
    assert positions(0, 10, num_prompt_logprobs=0, prompt_start=100) == []


def test_who_does_not_ask_gets_none() -> None:
    assert positions(0, 10) == []
    assert list(prompt_positions(make_request(range(10)), 0, 10)) == []


def test_scored_rows_take_64_mib_and_there_is_always_one() -> None:
    assert max_scored_rows(2**18) == 64
    assert max_scored_rows(151_936) * 151_936 * 4 <= 64 * 2**20
    assert max_scored_rows(2**24) == max_scored_rows(2**24 + 1) == max_scored_rows(2**30) == 1
