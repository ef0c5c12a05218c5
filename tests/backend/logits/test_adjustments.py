"""Every parameter by its definition, on logits that can be worked out by hand; all of them together
against the reference; and the state that grows with a request against a new one."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from footplate.backend.logits.rows import LogitRows
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import ThinkingBudget

from .builders import SetGrammar, edited_row, make_params, make_request, run
from .reference import adjusted, possible_tokens

NOT = -math.inf
LOGITS = [1.0, -2.0, 3.0, 0.5, 0.0]


def edit(prompt: list[int], output: list[int], **fields: Any) -> list[float]:
    return edited_row(LOGITS, make_request(prompt, output, **fields))


# ---- what is possible


def test_tokens_that_are_not_allowed_are_impossible() -> None:
    assert edit([0], [], allowed_token_ids=(1, 3)) == [NOT, -2.0, NOT, 0.5, NOT]
    assert edit([0], [], allowed_token_ids=(0, 1, 2, 3, 4)) == LOGITS


def test_a_bad_word_of_one_token_is_never_possible() -> None:
    for output in ([], [2], [4, 2]):
        assert edit([2], output, bad_words=((2,), (4,))) == [1.0, -2.0, NOT, 0.5, NOT]


def test_a_bad_word_cannot_be_completed_and_its_parts_can_be_said() -> None:
    words = ((1, 2, 3), (2, 0))
    assert edit([0], [], bad_words=words) == LOGITS
    assert edit([0], [1], bad_words=words) == LOGITS
    assert edit([0], [1, 2], bad_words=words) == [NOT, -2.0, 3.0, NOT, 0.0]
    assert edit([0], [4, 1, 2], bad_words=words) == [NOT, -2.0, 3.0, NOT, 0.0]
    assert edit([0], [2], bad_words=words) == [NOT, *LOGITS[1:]]
    assert edit([0], [1, 2, 4], bad_words=words) == LOGITS


def test_a_bad_word_does_not_begin_in_the_prompt() -> None:
    assert edit([1], [2], bad_words=((1, 2, 3),)) == LOGITS
    assert edit([1, 2], [], bad_words=((1, 2, 3), (2, 0))) == LOGITS


def test_stop_tokens_are_impossible_before_min_tokens() -> None:
    stops = {"min_tokens": 2, "stop_token_ids": (2, 0)}
    for output in ([], [1]):
        assert edit([2], output, **stops) == [NOT, -2.0, NOT, 0.5, 0.0]
    assert edit([2], [1, 1], **stops) == LOGITS


def test_a_row_without_a_possible_token_is_an_error_that_names_the_masks() -> None:
    request = make_request(
        allowed_token_ids=(2, 3), bad_words=((3,),), min_tokens=1, stop_token_ids=(2,)
    )
    _, result = run(LogitRows(), request, LOGITS)
    assert result.errors[0].kind is ErrorKind.LOGITS
    for name in ("allowed_token_ids", "bad_words", "min_tokens"):
        assert name in result.errors[0].message


# ---- what is likely


def test_logit_bias_is_added() -> None:
    assert edit([0], [], logit_bias={1: 5.0, 2: -100.0, 4: 0.25}) == [1.0, 3.0, -97.0, 0.5, 0.25]


def test_logit_bias_does_not_make_possible_what_is_not() -> None:
    row = edit([0], [], logit_bias={2: 100.0}, allowed_token_ids=(0,))
    assert row == [1.0, NOT, NOT, NOT, NOT]


def test_repetition_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    # Token 0 from the prompt, 1 and 2 from the output; each once, however often it came.
    expected = [0.5, -4.0, 1.5, 0.5, 0.0]
    assert edit([0, 0, 4], [1, 2, 2], repetition_penalty=2.0) == expected
    assert edit([0, 1], [], repetition_penalty=0.5) == [2.0, -1.0, 3.0, 0.5, 0.0]


def test_frequency_counts_and_presence_does_not_and_neither_looks_at_the_prompt() -> None:
    prompt, output = [0, 0, 2], [2, 2, 4]
    assert edit(prompt, output, frequency_penalty=0.5) == [1.0, -2.0, 2.0, 0.5, -0.5]
    assert edit(prompt, output, presence_penalty=0.5) == [1.0, -2.0, 2.5, 0.5, -0.5]
    assert edit(prompt, output, presence_penalty=-2.0) == [1.0, -2.0, 5.0, 0.5, 2.0]


def test_penalties_come_in_order() -> None:
    # 3 / 2 first, and then two times 0.5 and once 0.25 off.
    penalties = {
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
    }
    assert edit([0], [2, 2], **penalties) == [0.5, -2.0, 0.25, 0.5, 0.0]
    # The bias comes before: (3 - 1) / 2.
    assert edit([0], [2, 2], **penalties, logit_bias={2: -1.0})[2] == -0.25


def test_penalties_count_any_number_of_different_tokens() -> None:
    rows, output = LogitRows(), [i * 7 % 300 for i in range(600)]
    request = make_request([0], frequency_penalty=0.5)
    for start in range(0, 600, 50):
        request.token_ids += output[start : start + 50]
        row, _ = run(rows, request, [1.0] * 300)
        said = output[: start + 50]
        assert row.tolist() == [1.0 - 0.5 * said.count(i) for i in range(300)]


def test_penalties_leave_the_impossible_impossible() -> None:
    row = edited_row([1.0, NOT], make_request([0], [1], repetition_penalty=2.0, logit_bias={1: 9}))
    assert row == [0.5, NOT]


@pytest.mark.parametrize("repetition_penalty", [1e-300, 1e300])
def test_penalties_beyond_all_floats_are_an_error_and_no_crash(repetition_penalty: float) -> None:
    request = make_request([0], [2], repetition_penalty=repetition_penalty)
    row, result = run(LogitRows(), request, LOGITS)
    if repetition_penalty < 1:
        assert result.errors[0].kind is ErrorKind.LOGITS
        assert result.errors[0].message.endswith("the request has penalties")
    else:
        assert not result.errors
        assert row[2] == 0


# ---- thinking


def think(output: list[int], num_tokens: int, prompt: tuple[int, ...] = (3,)) -> list[float]:
    budget = ThinkingBudget(num_tokens, start_ids=(3, 4), end_ids=(4, 0))
    return edit(list(prompt), output, thinking=budget)


def only(token_id: int) -> list[float]:
    return [0.0 if i == token_id else NOT for i in range(5)]


def test_thinking_ends_when_its_budget_is_spent() -> None:
    assert think([4], 2) == think([4, 1], 2) == LOGITS
    assert think([4, 1, 2], 2) == only(4)
    assert think([4, 1, 2, 4], 2) == only(0)
    assert think([4, 1, 2, 4, 0], 2) == LOGITS
    assert think([4, 1, 2, 4, 0, 1, 1, 1], 2) == LOGITS


def test_a_budget_of_nothing_ends_thinking_at_once() -> None:
    assert think([], 0) == LOGITS
    assert think([4], 0) == only(4)
    assert think([4, 4], 0) == only(0)


def test_an_end_that_has_begun_is_gone_on_with() -> None:
    assert think([4, 1, 4], 2) == only(0)
    assert think([4, 4, 4], 2) == only(0)


def test_thinking_may_begin_in_the_prompt_and_begin_again() -> None:
    assert think([2], 2, prompt=(3, 4, 1)) == only(4)
    assert think([], 2, prompt=(3, 4, 1, 4, 0)) == LOGITS
    again = [4, 0, 1, 3, 4]
    assert think([4, *again, 1], 2) == LOGITS
    assert think([4, *again, 1, 1], 2) == only(4)


def test_a_second_start_gives_no_more_time() -> None:
    assert think([4, 3, 4], 2) == only(0)
    assert think([4, 1, 3, 4, 1], 3) == only(4)


def test_the_start_does_not_count_as_the_beginning_of_the_end() -> None:
    # 4 ends the start and would begin the end.
    assert think([4, 0], 5) == LOGITS
    assert think([4, 0, 1, 1, 1, 1], 5) == only(4)


def test_marks_are_found_where_their_beginning_is_repeated() -> None:
    budget = ThinkingBudget(9, start_ids=(3, 3, 4), end_ids=(0, 0, 1, 0, 0, 2))

    def forced(output: list[int]) -> int | None:
        row = edit([3, 3, 3, 4], output, thinking=budget)
        return None if row == LOGITS else row.index(0.0)

    assert forced([1] * 8) is None
    assert forced([1] * 9) == 0
    assert forced([1] * 7 + [0, 0, 0]) == 1
    assert forced([1] * 4 + [0, 0, 1, 0, 0]) == 2
    # What matched of the longer beginning goes on as the shorter one.
    assert forced([1] * 3 + [0, 0, 1, 0, 0, 1]) == 0
    assert forced([1] * 3 + [0, 0, 1, 0, 0, 1, 0, 0, 2]) is None


def test_an_end_of_thinking_that_is_no_token_is_an_error() -> None:
    request = make_request([3], thinking=ThinkingBudget(0, (3,), (5,)))
    assert run(LogitRows(), request, LOGITS)[1].errors[0].kind is ErrorKind.INVALID


# ---- forced tokens


def test_forced_tokens_come_whatever_the_logits_say() -> None:
    forced: dict[str, Any] = {
        "forced_token_ids": (4, 0),
        "allowed_token_ids": (1,),
        "bad_words": ((1,),),
    }
    for output, token_id in (([], 4), ([4], 0)):
        _, result = run(LogitRows(), make_request([0], output, **forced), LOGITS)
        assert (result.token_ids, result.errors) == ([token_id], {})
    request = make_request([0], [4, 0], forced_token_ids=(4, 0))
    assert run(LogitRows(), request, LOGITS)[1].token_ids == [2]


def test_a_forced_token_beyond_the_vocabulary_is_an_error() -> None:
    for token_id, is_wrong in ((4, False), (5, True), (2**31 - 1, True)):
        request = make_request(forced_token_ids=(token_id,))
        errors = run(LogitRows(), request, LOGITS)[1].errors
        assert [error.kind for error in errors.values()] == [ErrorKind.INVALID] * is_wrong


# ---- ids beyond the vocabulary


def test_ids_beyond_the_vocabulary_change_nothing_and_crash_nothing() -> None:
    beyond = (5, 2**31 - 1)
    row = edit(
        [0, *beyond],
        [2, *beyond],
        min_tokens=10,
        stop_token_ids=(4, *beyond),
        allowed_token_ids=(0, 1, 2, 3, 4, *beyond),
        bad_words=((1,), beyond, (beyond[1],), (beyond[0], 3), (beyond[1], 0)),
        logit_bias={beyond[0]: 3.0, beyond[1]: 3.0},
        presence_penalty=0.5,
        repetition_penalty=2.0,
    )
    assert row == [NOT, NOT, 1.0, 0.5, NOT]


# ---- all of it


VOCAB_SIZE = 8
token_lists = st.lists(st.integers(0, VOCAB_SIZE), max_size=12)
id_tuples = st.lists(st.integers(0, VOCAB_SIZE + 2), min_size=1, max_size=6).map(tuple)
marks = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
some_params = st.builds(
    make_params,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 3, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**63 - 1),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.just(()) | id_tuples,
    allowed_token_ids=st.none() | id_tuples,
    bad_words=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 9), st.integers(-400, 400).map(lambda i: i / 4)),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    thinking=st.none() | st.builds(ThinkingBudget, st.integers(0, 4), marks, marks),
    forced_token_ids=st.none() | st.lists(st.integers(0, 7), min_size=1, max_size=9).map(tuple),
)
grids = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=8, max_size=8)
grammars = st.none() | st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1)


@settings(max_examples=600, deadline=None)
@given(grids, st.lists(st.integers(0, 8), min_size=1), token_lists, some_params, grammars)
def test_row_and_token_are_those_of_the_definition(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    params: Any,
    allowed: set[int] | None,
) -> None:
    grammar = None
    if allowed is not None:
        everything = set(range(VOCAB_SIZE + 3))
        grammar = SetGrammar(*[everything] * len(output), allowed, everything)
    request = make_request(prompt, output, params=params, grammar=grammar)
    row, result = run(LogitRows(), request, logits)
    tokens = [*prompt, *output]
    expected = adjusted(logits, tokens, len(prompt), params, allowed)
    np.testing.assert_array_equal(row, np.array(expected, np.float32))
    if params.temperature == 0:
        [token_id] = possible_tokens(logits, tokens, len(prompt), params, allowed)
        if token_id is None:
            assert result.errors
        elif allowed is None or token_id in allowed:
            assert (result.token_ids, result.errors) == ([token_id], {})
        else:
            assert result.errors[0].kind is ErrorKind.GRAMMAR, "forced against the grammar"


@settings(max_examples=200, deadline=None)
@given(
    grids,
    st.lists(st.integers(0, 8), min_size=1),
    st.lists(st.integers(0, 8), max_size=200),
    some_params,
    st.sets(st.integers(0, 200)),
)
def test_state_that_has_grown_is_state_that_is_made_anew(
    logits: list[float], prompt: list[int], output: list[int], params: Any, looks: set[int]
) -> None:
    rows, request = LogitRows(), make_request(prompt, params=params)
    for position, token_id in enumerate([*output, 0]):
        if position in looks or position == len(output):
            row, _ = run(rows, request, logits)
            fresh = make_request(prompt, output[:position], params=params)
            np.testing.assert_array_equal(row, run(LogitRows(), fresh, logits)[0])
        request.token_ids.append(token_id)


def test_a_step_that_is_run_again_changes_nothing() -> None:
    fields: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "thinking": ThinkingBudget(3, (1,), (0,)),
    }
    rows, request = LogitRows(), make_request([1], [2, 2], **fields)
    first = run(rows, request, LOGITS)[0].tolist()
    assert run(rows, request, LOGITS)[0].tolist() == first
    request.token_ids.append(2)
    assert run(rows, request, LOGITS)[0].tolist() != first
    del request.token_ids[-1]
    assert run(rows, request, LOGITS)[0].tolist() == first


def test_nothing_is_kept_of_forgotten_requests() -> None:
    rows = LogitRows()
    for key in range(4):
        run(rows, make_request(key=key, presence_penalty=1.0), LOGITS)
    assert len(rows) == 4
    rows.forget([0, 2, 99])
    assert len(rows) == 2
    rows.forget(range(4))
    assert len(rows) == 0


def test_another_request_of_the_same_key_starts_afresh() -> None:
    rows = LogitRows()
    run(rows, make_request([0], [2, 2, 2], frequency_penalty=0.5), LOGITS)
    row, _ = run(rows, make_request([0], [4, 4, 4], frequency_penalty=0.5), LOGITS)
    assert row.tolist() == [1.0, -2.0, 3.0, 0.5, -1.5]
