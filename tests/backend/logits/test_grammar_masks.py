"""Grammars: whose tokens are possible, when an output is complete, and that matchers only go
forward."""

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from footplate.backend.logits.rows import LogitRows
from footplate.backend.structured.interface import GrammarError
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import ThinkingBudget

from .builders import SetGrammar, SetMatcher, edited_row, make_request, run

NOT = -math.inf
LOGITS = [1.0, -2.0, 3.0, 0.5, 0.0]
ABC = ({0, 1}, {2}, {3, 4})


def grammar_of(*allowed: set[int]) -> SetGrammar:
    return SetGrammar(*allowed, vocab_size=5)


def test_tokens_that_the_grammar_does_not_allow_are_impossible() -> None:
    for output, row in (
        ([], [1.0, -2.0, NOT, NOT, NOT]),
        ([0], [NOT, NOT, 3.0, NOT, NOT]),
        ([1, 2], [NOT, NOT, NOT, 0.5, 0.0]),
    ):
        assert edited_row(LOGITS, make_request([4], output, grammar=grammar_of(*ABC))) == row


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 65])
def test_every_bit_of_a_mask_is_one_token(vocab_size: int) -> None:
    for token_id in {0, vocab_size // 2, vocab_size - 1}:
        request = make_request(grammar=SetGrammar({token_id}, vocab_size=vocab_size))
        row = edited_row([1.0] * vocab_size, request)
        assert [i for i, x in enumerate(row) if x > NOT] == [token_id]


def test_the_last_token_of_a_grammar_completes_the_output() -> None:
    rows, request = LogitRows(), make_request(grammar=grammar_of(*ABC))
    complete = []
    for _ in ABC:
        _, result = run(rows, request, LOGITS)
        request.token_ids += result.token_ids
        complete.append(result.complete == {0})
    assert request.token_ids[1:] == [0, 2, 3]
    assert complete == [False, False, True]


def test_one_matcher_takes_every_token_once_and_makes_one_mask_per_token() -> None:
    grammar = grammar_of(*ABC)
    rows, request = LogitRows(), make_request(grammar=grammar)
    for _ in ABC:
        rows.prepare([request], 5)
        rows.prepare([request], 5)
        request.token_ids += run(rows, request, LOGITS)[1].token_ids
    [matcher] = grammar.matchers
    assert (matcher.taken, matcher.num_masks) == ([0, 2, 3], 3)


def test_a_mask_that_was_begun_ahead_is_the_mask_of_the_next_token() -> None:
    grammar = grammar_of(*ABC)
    rows, request = LogitRows(), make_request(grammar=grammar)
    for number in range(len(ABC)):
        request.token_ids += run(rows, request, LOGITS)[1].token_ids
        if number + 1 < len(ABC):
            del request.token_ids[-1]  # the scheduler has not taken it yet
            rows.prepare_ahead([request], 5)
            request.token_ids.append(grammar.matchers[0].taken[-1])
        rows.prepare([request], 5)
    [matcher] = grammar.matchers
    assert request.token_ids[1:] == matcher.taken == [0, 2, 3]
    assert matcher.num_masks == 3


@pytest.mark.parametrize("kept", [[], [1]], ids=["a step run again", "another token"])
def test_a_mask_that_was_begun_in_vain_is_not_used(kept: list[int]) -> None:
    grammar = SetGrammar({0, 1}, {2, 3}, {4}, vocab_size=5)
    rows, request = LogitRows(), make_request(grammar=grammar)
    assert run(rows, request, LOGITS)[1].token_ids == [0]
    rows.prepare_ahead([request], 5)
    request.token_ids += kept
    rows.prepare([request], 5)
    [token_id] = run(rows, request, LOGITS)[1].token_ids
    assert token_id == ([0] if not kept else [2])[0]
    assert [matcher.taken for matcher in grammar.matchers] == [[0], [*kept, token_id]]


def test_an_output_that_is_there_already_is_taken_first() -> None:
    grammar = grammar_of(*ABC)
    request = make_request(output=[1, 2], grammar=grammar)
    assert run(LogitRows(), request, LOGITS)[1].token_ids == [3]
    assert grammar.matchers[0].taken == [1, 2, 3]


def test_a_step_that_is_run_again_starts_another_matcher() -> None:
    grammar = grammar_of(*ABC)
    rows, request = LogitRows(), make_request(output=[1], grammar=grammar)
    assert run(rows, request, LOGITS)[1].token_ids == [2]
    assert run(rows, request, LOGITS)[1].token_ids == [2]
    assert [matcher.taken for matcher in grammar.matchers] == [[1, 2], [1, 2]]


def test_a_step_that_fails_before_its_tokens_leaves_nothing_wrong() -> None:
    grammar = grammar_of(*ABC)
    rows, request = LogitRows(), make_request(output=[1], grammar=grammar)
    rows.prepare([request], 5)  # and then the forward pass raises
    rows.prepare([request], 5)
    assert run(rows, request, LOGITS)[1].token_ids == [2]
    assert grammar.matchers[0].num_masks == 1


def test_a_forgotten_request_starts_another_matcher() -> None:
    grammar = grammar_of(*ABC)
    rows, request = LogitRows(), make_request(grammar=grammar)
    request.token_ids += run(rows, request, LOGITS)[1].token_ids
    rows.forget([request.key])
    assert len(rows) == 0
    assert run(rows, request, LOGITS)[1].token_ids == [2]
    assert len(grammar.matchers) == 2


def test_masks_are_made_beside_the_forward_pass() -> None:
    class Waiting(SetMatcher):
        def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
            assert threading.current_thread() is not threading.main_thread()
            begun.set()
            assert go_on.wait(10)
            super().fill_mask(mask)

    begun, go_on = threading.Event(), threading.Event()
    grammar = grammar_of(*ABC)
    grammar.start = lambda: Waiting(grammar)  # type: ignore[method-assign]
    rows, request = LogitRows(), make_request(grammar=grammar)
    rows.prepare([request], 5)
    assert begun.wait(10), "it waits for the forward pass"
    go_on.set()
    assert run(rows, request, LOGITS)[1].token_ids == [0]


# ---- with other parameters


def test_a_grammar_cannot_be_broken_by_what_comes_before_it() -> None:
    fields: dict[str, Any] = {
        "logit_bias": {3: 100.0},
        "presence_penalty": -2.0,
        "allowed_token_ids": (1, 3),
    }
    request = make_request(grammar=grammar_of({1, 2}), **fields)
    assert edited_row(LOGITS, request) == [NOT, -2.0, NOT, NOT, NOT]


def test_min_tokens_masks_stop_tokens_unless_the_grammar_allows_nothing_else() -> None:
    stops: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": (2, 3, 9)}
    some = make_request(grammar=grammar_of({1, 2}), **stops)
    assert edited_row(LOGITS, some) == [NOT, -2.0, NOT, NOT, NOT]
    none = make_request(grammar=grammar_of({2, 3}), **stops)
    assert edited_row(LOGITS, none) == [NOT, NOT, 3.0, 0.5, NOT]


def test_a_thinking_budget_gives_way_to_the_grammar() -> None:
    budget = ThinkingBudget(0, (4,), (0,))
    allowed = make_request([4], grammar=grammar_of({0, 1}), thinking=budget)
    assert edited_row(LOGITS, allowed) == [0.0, NOT, NOT, NOT, NOT]
    other = make_request([4], grammar=grammar_of({1, 2}), thinking=budget)
    assert edited_row(LOGITS, other) == [NOT, -2.0, 3.0, NOT, NOT]


def test_masks_that_leave_nothing_together_are_an_error_that_names_both() -> None:
    request = make_request(grammar=grammar_of({1, 2}), allowed_token_ids=(3,))
    error = run(LogitRows(), request, LOGITS)[1].errors[0]
    assert error.kind is ErrorKind.LOGITS
    assert "allowed_token_ids" in error.message and "the grammar" in error.message


# ---- what goes wrong


def failures(request: Any, rows: LogitRows | None = None) -> list[tuple[ErrorKind, str]]:
    result = run(rows or LogitRows(), request, LOGITS)[1]
    return [(error.kind, error.message) for error in result.errors.values()]


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    request = make_request(grammar=grammar_of(set(), {1}))
    assert failures(request) == [(ErrorKind.GRAMMAR, "the grammar allows no further token")]


def test_a_broken_row_names_what_its_request_did_to_it() -> None:
    request = make_request(grammar=grammar_of({1, 2}), logit_bias={1: 2.0})
    error = run(LogitRows(), request, [math.nan] * 5)[1].errors[0]
    assert error.kind is ErrorKind.LOGITS
    assert error.message.endswith("the request has logit_bias, the grammar")


def test_an_output_outside_of_its_grammar_is_an_error_every_time() -> None:
    rows, request = LogitRows(), make_request(output=[0, 1], grammar=grammar_of(*ABC))
    expected = [(ErrorKind.GRAMMAR, "token 1 is not allowed at 1")]
    assert failures(request, rows) == expected
    rows.prepare([request], 5)
    assert failures(request, rows) == expected


def test_limits_of_a_matcher_are_an_error_wherever_it_meets_them() -> None:
    class Limited(SetMatcher):
        def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
            raise GrammarError("too many items")

    class LimitedLater(SetMatcher):
        def advance(self, token_ids: Any) -> bool:
            raise GrammarError("too many items")

    for matcher in (Limited, LimitedLater):
        grammar = grammar_of(*ABC)
        grammar.start = lambda kind=matcher, own=grammar: kind(own)  # type: ignore[method-assign,misc]
        assert failures(make_request(grammar=grammar)) == [(ErrorKind.GRAMMAR, "too many items")]


@pytest.mark.parametrize("where", ["start", "fill_mask", "advance"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError("a bug")])
def test_a_bug_in_a_grammar_engine_ends_its_request_alone(where: str, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    bad, good = grammar_of(*ABC), grammar_of(*ABC)
    if where == "start":
        bad.start = fail  # type: ignore[method-assign,assignment]
    else:
        make = bad.start
        bad.start = lambda: _with(make(), where, fail)  # type: ignore[method-assign]
    rows = LogitRows()
    requests = [make_request(key=key, grammar=g) for key, g in enumerate((good, bad, good))]
    rows.prepare(requests, 5)  # in one job
    for _ in range(2):
        found = [failures(request, rows) for request in requests]
        words = f"the grammar engine failed: {type(error).__name__}: a bug"
        assert found == [[], [(ErrorKind.GRAMMAR, words)], []]


def _with(matcher: SetMatcher, name: str, method: Any) -> SetMatcher:
    setattr(matcher, name, method)
    return matcher


def test_what_a_grammar_forbids_cannot_be_chosen_whatever_its_logit_is() -> None:
    logits = [math.nan, 1.0, math.inf, -0.0, -math.inf]
    grammar = SetGrammar({1, 3, 4}, vocab_size=5)
    row, result = run(LogitRows(), make_request(grammar=grammar), logits)
    assert result.token_ids == [1] and not result.errors
    assert row.tobytes() == np.array([-math.inf, 1.0, -math.inf, -0.0, -math.inf], "f4").tobytes()
    bad = SetGrammar({0, 1}, vocab_size=5)
    assert run(LogitRows(), make_request(grammar=bad), logits)[1].errors[0].kind is ErrorKind.LOGITS
