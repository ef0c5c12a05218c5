"""What the core refuses, at the limit and one beyond it, and what it makes of the rest."""

from math import inf, nan
from typing import Any

import msgspec
import pytest

from footplate.backend.admission import (
    MAX_HANDLE,
    Admission,
    RefusalError,
    handles_of,
    make_requests,
)
from footplate.backend.backlog import Backlog
from footplate.protocol.bounds import MAX_N, MAX_SEED
from footplate.protocol.config import RequestConfig
from footplate.protocol.messages import AddRequest, ErrorKind, ModelFacts
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsRequest,
    ProcessorCall,
    RepetitionDetection,
    ThinkingBudget,
    TokenParams,
)

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 5, 0, ())
VOCAB_SIZE = 100
MAX_MODEL_LEN = 40
MODEL = ModelFacts("", "", "", VOCAB_SIZE, MAX_MODEL_LEN, (), "", "", "")
CONFIG = RequestConfig(logits_processors=("a:B",), max_num_queued_reqs=8, max_num_queued_tokens=50)


def check(
    prompt: list[int] | None = None,
    *,
    live: tuple[int, ...] = (),
    backlog: tuple[int, int] = (0, 0),
    fields: dict[str, Any] | None = None,
    **params: Any,
) -> None:
    books = Backlog()
    books.num_requests, books.num_tokens = backlog
    message = AddRequest(
        handle=7,
        prompt_token_ids=[1, 2, 3] if prompt is None else prompt,
        params=msgspec.structs.replace(PARAMS, **params),
    )
    Admission(MODEL, CONFIG).check(
        msgspec.structs.replace(message, **(fields or {})), set(live), books
    )


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(RefusalError) as caught:
        check(*args, **options)
    assert caught.value.kind is ErrorKind.INVALID
    return str(caught.value)


@pytest.mark.parametrize("prompt", [[0], [VOCAB_SIZE - 1], [1] * (MAX_MODEL_LEN - 1)])
def test_prompts_at_the_limits_are_taken(prompt: list[int]) -> None:
    check(prompt)


@pytest.mark.parametrize("prompt", [[], [-1], [VOCAB_SIZE], [1] * MAX_MODEL_LEN, [2**63]])
def test_prompts_beyond_the_limits_are_not(prompt: list[int]) -> None:
    assert "must be" in refusal(prompt)


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"n": MAX_N}, {}),
        ({"handle": MAX_HANDLE}, {}),
        ({"handle": MAX_HANDLE - 1, "n": 2}, {}),
        ({"prior_token_ids": [1, 2, 3, 4]}, {}),
        ({"prior_token_ids": [9]}, {"stop_token_ids": (9,), "min_tokens": 1}),
        ({"prior_token_ids": [9, 9]}, {"repetition": RepetitionDetection(1, 1, 3)}),
        (
            {"prior_token_ids": [9, 9]},
            {"repetition": RepetitionDetection(1, 1, 2), "min_tokens": 3},
        ),
        ({"age_s": 1e9, "ttft_deadline_s": 0.0, "deadline_s": 1e9}, {}),
        ({}, {"seed": MAX_SEED}),
        ({}, {"adjustments": LogitAdjustments(logit_bias={99: 1.0}, allowed_token_ids=(0, 99))}),
        ({}, {"adjustments": LogitAdjustments(processors=(ProcessorCall(0, {}),))}),
        ({}, {"logprobs": LogprobsRequest(-1, (99,), VOCAB_SIZE, (0,), 10**9)}),
        ({}, {"stop_token_ids": (VOCAB_SIZE,)}),  # it will never come
    ],
)
def test_requests_at_the_limits_are_taken(fields: dict[str, Any], params: dict[str, Any]) -> None:
    config = RequestConfig(logits_processors=("a:B",))
    message = AddRequest(7, [1, 2, 3], msgspec.structs.replace(PARAMS, **params))
    Admission(MODEL, config).check(msgspec.structs.replace(message, **fields), (), Backlog())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, f"n is 0, must be 1 to {MAX_N}"),
        ({"n": MAX_N + 1}, f"n is {MAX_N + 1}, must be 1 to {MAX_N}"),
        ({"handle": MAX_HANDLE, "n": 2}, "too large"),
        ({"prior_token_ids": [1] * 5}, "must be fewer than max_tokens, which is 5"),
        ({"prior_token_ids": [-1]}, "token ids of the prior output must be 0 to 99"),
        ({"prior_token_ids": [VOCAB_SIZE]}, "token ids of the prior output must be 0 to 99"),
        ({"age_s": nan}, "age_s is nan"),
        ({"age_s": inf}, "age_s is inf"),
        ({"age_s": -1.0}, "age_s is -1.0"),
        ({"ttft_deadline_s": nan}, "ttft_deadline_s is nan"),
        ({"ttft_deadline_s": -0.1}, "ttft_deadline_s is -0.1, must be finite and at least 0"),
        ({"deadline_s": inf}, "deadline_s is inf"),
        ({"deadline_s": -inf}, "deadline_s is -inf"),
    ],
)
def test_messages_beyond_the_limits_are_not(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(fields=fields)


def test_prompt_and_prior_output_have_to_leave_room_for_a_token() -> None:
    check([1] * 36, fields={"prior_token_ids": [1] * 3})
    assert refusal([1] * 36, fields={"prior_token_ids": [1] * 4}) == (
        "prompt and prior output have 40 tokens, must be at most 39"
    )


@pytest.mark.parametrize("prior", [[9], [9, 1], [1, 9]])
def test_a_prior_output_that_had_ended_is_refused(prior: list[int]) -> None:
    assert "stop token" in refusal(fields={"prior_token_ids": prior}, stop_token_ids=(9,))


def test_a_prior_output_that_had_been_ended_for_its_repetition_is_refused() -> None:
    wanted = RepetitionDetection(2, 1, 2)
    words = refusal(fields={"prior_token_ids": [4, 5, 4, 5]}, repetition=wanted)
    assert "repetitive" in words


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": nan},
        {"temperature": inf},
        {"top_p": nan},
        {"min_p": nan},
        {"seed": MAX_SEED + 1},
        {"seed": -1},
        {"repetition": RepetitionDetection(1, 2, 2)},
        {"repetition": RepetitionDetection(1025, 1, 2)},
        {"adjustments": LogitAdjustments(presence_penalty=nan)},
        {"adjustments": LogitAdjustments(repetition_penalty=inf)},
        {"adjustments": LogitAdjustments(logit_bias={1: nan})},
        {"adjustments": LogitAdjustments(logit_bias={VOCAB_SIZE: 1.0})},
        {"adjustments": LogitAdjustments(allowed_token_ids=(1, VOCAB_SIZE))},
        {"adjustments": LogitAdjustments(forced_token_ids=(VOCAB_SIZE,))},
        {"adjustments": LogitAdjustments(bad_words=((1,), (1, VOCAB_SIZE)))},
        {"adjustments": LogitAdjustments(thinking=ThinkingBudget(1, (1,), (VOCAB_SIZE,)))},
        {"adjustments": LogitAdjustments(processors=(ProcessorCall(1, {}),))},
        {"logprobs": LogprobsRequest(num_logprobs=-2)},
        {"logprobs": LogprobsRequest(num_prompt_logprobs=VOCAB_SIZE + 1)},
        {"logprobs": LogprobsRequest(token_ids=(VOCAB_SIZE,))},
        {"logprobs": LogprobsRequest(prompt_token_ids=(VOCAB_SIZE,))},
    ],
)
def test_parameters_that_could_hurt_the_core_are_refused(params: dict[str, Any]) -> None:
    assert refusal(**params)


@pytest.mark.parametrize("live", [7, 8, 9])
def test_a_handle_in_use_anywhere_refuses_all(live: int) -> None:
    assert refusal(live=(live,), fields={"n": 3}) == f"handle {live} is in use"


@pytest.mark.parametrize("live", [6, 10])
def test_handles_beside_the_range_do_not_matter(live: int) -> None:
    check(live=(live,), fields={"n": 3})


def overflow(*args: Any, **options: Any) -> str:
    with pytest.raises(RefusalError) as caught:
        check(*args, **options)
    assert caught.value.kind is ErrorKind.OVERFLOW
    return str(caught.value)


def test_queue_limits_hold_at_the_limit_and_one_beyond() -> None:
    check(backlog=(7, 47))
    assert overflow(backlog=(8, 0)) == (
        "8 are queued and 1 more would exceed max_num_queued_reqs, which is 8"
    )
    assert overflow(backlog=(0, 48)) == (
        "48 are queued and 3 more would exceed max_num_queued_tokens, which is 50"
    )


def test_n_counts_as_n_requests_and_one_prompt() -> None:
    check(backlog=(5, 47), fields={"n": 3})
    assert "max_num_queued_reqs" in overflow(backlog=(6, 0), fields={"n": 3})


def test_a_replayed_request_has_been_queued_before_and_knows_no_limit() -> None:
    check(backlog=(8, 50), fields={"n": 3, "is_replay": True})
    assert refusal([], backlog=(8, 50), fields={"is_replay": True})


def test_an_invalid_request_is_invalid_also_when_there_is_no_room() -> None:
    assert refusal([], backlog=(8, 50))


@pytest.mark.parametrize(
    ("handle", "n", "handles"),
    [(7, 1, [7]), (7, 3, [7, 8, 9]), (7, MAX_N + 1, [7]), (MAX_HANDLE, 2, [MAX_HANDLE])],
)
def test_who_is_told_of_a_refusal(handle: int, n: int, handles: list[int]) -> None:
    assert list(handles_of(AddRequest(handle, [1], PARAMS, n=n))) == handles


def test_siblings_differ_in_handle_key_and_seed_and_have_one_list() -> None:
    message = AddRequest(
        5, [1, 2], msgspec.structs.replace(PARAMS, seed=40), n=3, prior_token_ids=[3], age_s=2.0
    )
    requests = make_requests(b"c", message, 100, now=10.0)
    assert [r.handle for r in requests] == [5, 6, 7]
    assert [r.key for r in requests] == [100, 101, 102]
    assert [r.params.seed for r in requests] == [40, 41, 42]
    assert {id(r.token_ids) for r in requests} == {id(requests[0].token_ids)}
    assert {(r.num_prompt_tokens, r.num_prior_tokens, r.arrival_time) for r in requests} == {
        (2, 1, 8.0)
    }
    assert requests[0].token_ids == [1, 2, 3]


def test_seeds_go_round_at_the_largest() -> None:
    message = AddRequest(5, [1], msgspec.structs.replace(PARAMS, seed=MAX_SEED), n=2)
    assert [r.params.seed for r in make_requests(b"c", message, 1, now=0.0)] == [MAX_SEED, 0]
