"""Logprobs against a plain reference in float64, their wire format, and their bits in any batch."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from footplate.backend.logits.logprobs import log_softmax, log_sum_exp, score_rows
from footplate.backend.logits.most_likely import most_likely
from footplate.backend.logits.rows import LogitRows
from footplate.backend.request import Request
from footplate.backend.step import ScoredRows
from footplate.protocol.token_params import LogprobsMode, LogprobsRequest

from .builders import FloatRow, SetGrammar, make_params, make_request, run

NOT = -math.inf
LOGITS = [1.0, -2.0, 3.0, 3.0, 0.0]
RAW, PROCESSED = LogprobsMode.RAW_LOGPROBS, LogprobsMode.PROCESSED_LOGPROBS


def unpack(scored: ScoredRows) -> list[tuple[int, list[int], list[float]]]:
    """Rank, ids and scores of each row."""
    num_rows = len(scored.ranks)
    ids = np.frombuffer(scored.token_ids, "<i4").reshape(num_rows, -1)
    scores = np.frombuffer(scored.logprobs, "<f4").reshape(num_rows, -1)
    assert ids.shape == scores.shape
    return list(zip(scored.ranks, ids.tolist(), scores.tolist(), strict=True))


def score(
    row: Sequence[float],
    token_id: int,
    num_most_likely: int = 0,
    further: Sequence[int] = (),
    mode: LogprobsMode = RAW,
) -> tuple[int, list[int], list[float]]:
    rows = [np.array(row, np.float32)]
    [scored] = unpack(score_rows(rows, [token_id], 0, num_most_likely, further, mode, log_sum_exp))
    return scored


def exact(row: Sequence[float]) -> list[float]:
    """Log softmax by its definition."""
    largest = max(row)
    total = math.fsum(math.exp(x - largest) for x in row)
    return [x - largest - math.log(total) for x in row]


# ---- what is in a row


def test_the_token_itself_comes_first_then_the_most_likely_then_those_asked_for() -> None:
    rank, ids, scores = score(LOGITS, 1, 3, (4, 2))
    assert (rank, ids) == (5, [1, 2, 3, 0, 4, 2])
    assert scores == pytest.approx([exact(LOGITS)[i] for i in ids], rel=1e-6)


def test_a_count_of_nothing_gives_the_token_alone() -> None:
    assert score(LOGITS, 3)[:2] == (1, [3])


@pytest.mark.parametrize("count", [-1, 5, 6, 1000])
def test_a_count_of_the_whole_vocabulary_gives_all_in_order(count: int) -> None:
    assert score(LOGITS, 0, count)[1] == [0, 2, 3, 0, 4, 1]


def test_ranks_count_what_is_strictly_more_likely() -> None:
    assert [score(LOGITS, token_id)[0] for token_id in range(5)] == [3, 5, 1, 1, 4]


def test_ids_beyond_the_vocabulary_are_impossible() -> None:
    assert score(LOGITS, 0, 0, (5, 2**31 - 1))[1:] == (
        [0, 5, 2**31 - 1],
        [pytest.approx(exact(LOGITS)[0]), NOT, NOT],
    )


def test_logits_are_given_as_they_are_where_the_mode_says_so() -> None:
    for mode in (LogprobsMode.RAW_LOGITS, LogprobsMode.PROCESSED_LOGITS):
        assert score(LOGITS, 1, 1, (4, 7), mode)[2] == [-2.0, 3.0, 0.0, NOT]


def test_the_impossible_has_no_part() -> None:
    row = [NOT, 0.0, NOT, math.log(3), NOT]
    rank, ids, scores = score(row, 0, -1)
    assert (rank, ids) == (3, [0, 3, 1, 0, 2, 4])
    assert scores == [NOT, pytest.approx(math.log(0.75)), pytest.approx(math.log(0.25)), *[NOT] * 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_distribution_has_no_logprobs_and_no_crash(bad: float) -> None:
    _, ids, scores = score([0.0, bad, 1.0, bad], 0, 2)
    assert len(ids) == 3 and all(map(math.isnan, scores))
    assert score([NOT] * 4, 0, 2) == (1, [0, 0, 1], [NOT] * 3)


def test_the_wire_has_little_endian_words_of_32_bits() -> None:
    rows = [np.array(LOGITS, np.float32)]
    scored = score_rows(rows, [2], 7, 1, (258,), LogprobsMode.RAW_LOGITS, log_sum_exp)
    assert scored.position == 7
    assert scored.token_ids == b"\2\0\0\0\2\0\0\0\2\1\0\0"
    assert scored.logprobs == b"\0\0\x40\x40" * 2 + b"\0\0\x80\xff"


# ---- accuracy and bits


rows_of_all_kinds = st.lists(
    st.floats(-200, 200, width=32) | st.integers(-3, 3).map(float) | st.just(NOT),
    min_size=1,
    max_size=70,
)


@settings(max_examples=300, deadline=None)
@given(rows_of_all_kinds, st.integers(-1, 80), st.data())
def test_scores_are_those_of_the_definition(
    row: list[float], count: int, data: st.DataObject
) -> None:
    token_id = data.draw(st.integers(0, len(row) - 1))
    rank, ids, scores = score(row, token_id, count)
    by_likelihood = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert ids == [token_id, *by_likelihood[: len(row) if count < 0 else count]]
    assert rank == 1 + sum(x > row[token_id] for x in row)
    if max(row) > NOT:
        expected = exact(row)
        for i, x in zip(ids, scores, strict=True):
            assert x == pytest.approx(expected[i], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("vocab", [33, 4096, 50_257, 151_936])
def test_a_large_row_is_as_accurate(vocab: int) -> None:
    row = (np.random.default_rng(vocab).normal(size=vocab) * 4).astype(np.float32)
    wide = row.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    np.testing.assert_allclose(log_softmax(row, log_sum_exp(row)), expected, atol=2e-6)
    assert most_likely(row, 20).tolist() == np.argsort(-wide, kind="stable")[:20].tolist()


def test_ranks_are_the_same_whoever_is_told_of_beside_the_token() -> None:
    row = np.round(np.random.default_rng(5).normal(size=5003) * 3).astype(np.float32)
    for token_id in (int(row.argmax()), int(row.argmin()), *range(0, 5003, 97)):
        rank = 1 + int((row > row[token_id]).sum())
        for count in (0, 1, 5, 20, 5003):
            assert score(row.tolist(), token_id, count)[0] == rank, (token_id, count)


@pytest.mark.parametrize(
    "kind", ["left over", "ties", "few possible", "one possible", "sorted", "equal"]
)
def test_the_most_likely_of_a_large_row_are_found_whatever_it_is_like(kind: str) -> None:
    row = np.random.default_rng(3).normal(size=5003).astype(np.float32)
    match kind:
        case "ties":
            row = np.round(row * 2)
        case "few possible":
            row[row < 3] = NOT
        case "one possible":
            row[np.arange(5003) != 4999] = NOT
        case "sorted":
            row.sort()
        case "left over":
            row[-11:] = np.arange(11) + 100
        case "equal":
            row[:] = 1.0
    order = np.argsort(-row, kind="stable")
    # 78 groups are enough for 39; 11 numbers are in none.
    for size in (0, 1, 2, 20, 39, 40, 500, 5002, 5003):
        assert most_likely(row, size).tolist() == order[:size].tolist(), size


@pytest.mark.parametrize("vocab", [1, 33, 4099, 151_936])
def test_a_row_has_the_same_bits_in_any_batch_and_at_any_place_in_memory(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = (rng.normal(size=(12, vocab)) * 3).astype(np.float32)
    tokens = rng.integers(vocab, size=12).tolist()

    def score_all(some: Any, which: list[int]) -> list[Any]:
        scored = score_rows(some, [tokens[i] for i in which], 0, 5, (0,), RAW, log_sum_exp)
        width = len(scored.logprobs) // len(which)
        return [
            (
                scored.ranks[n],
                scored.token_ids[n * width :][:width],
                scored.logprobs[n * width :][:width],
            )
            for n in range(len(which))
        ]

    alone = [score_all(rows[i : i + 1].copy(), [i])[0] for i in range(12)]
    shuffle = random.Random(vocab)
    for size in (2, 5, 12):
        which = shuffle.sample(range(12), size)
        shifted = np.empty(size * vocab + 5, np.float32)[5:].reshape(size, vocab)
        shifted[:] = rows[which]
        columns = np.asfortranarray(rows[which])
        for batch in (rows[which], shifted, columns):
            assert score_all(batch, which) == [alone[i] for i in which]


# ---- of what


def logprobs_of(
    request: Request, logits: Sequence[float] = LOGITS
) -> tuple[int, list[int], list[float]]:
    _, result = run(LogitRows(), request, logits)
    assert not result.errors
    [scored] = unpack(result.logprobs[0])
    assert result.logprobs[0].position == request.num_output_tokens
    assert scored[1][0] == result.token_ids[0]
    return scored


def wanted(num_logprobs: int | None = -1, **fields: Any) -> LogprobsRequest:
    return LogprobsRequest(num_logprobs, **fields)


EDITS: dict[str, Any] = {"logit_bias": {2: -9.0}, "presence_penalty": 1.0, "bad_words": ((3,),)}


def test_raw_numbers_are_those_of_the_model_whatever_is_done_to_them() -> None:
    for temperature in (0.0, 0.5):
        request = make_request(
            output=[0], logprobs=wanted(), temperature=temperature, top_k=2, **EDITS
        )
        rank, ids, scores = logprobs_of(request)
        assert ids[1:] == [2, 3, 0, 4, 1]
        assert scores == pytest.approx([exact(LOGITS)[i] for i in ids], rel=1e-6)
        assert rank == 1 + sum(x > LOGITS[ids[0]] for x in LOGITS)
    request = make_request(logprobs=wanted(mode=LogprobsMode.RAW_LOGITS), **EDITS)
    assert logprobs_of(request)[2][1:] == [3.0, 3.0, 1.0, 0.0, -2.0]


def test_processed_numbers_of_a_greedy_request_are_those_after_its_edits() -> None:
    request = make_request(output=[0], logprobs=wanted(mode=PROCESSED), top_k=2, **EDITS)
    row = [0.0, -2.0, -6.0, NOT, 0.0]
    rank, ids, scores = logprobs_of(request)
    assert (rank, ids) == (1, [0, 0, 4, 1, 2, 3])
    assert scores == pytest.approx([exact(row)[i] for i in ids], rel=1e-6)


def test_processed_numbers_of_others_are_those_of_what_is_drawn_from() -> None:
    mode = LogprobsMode.PROCESSED_LOGITS
    request = make_request(logprobs=wanted(mode=mode), temperature=0.5, top_k=3)
    assert logprobs_of(request)[2][1:] == [6.0, 6.0, 2.0, NOT, NOT]
    request = make_request(logprobs=wanted(mode=PROCESSED), temperature=2.0, top_p=0.5)
    assert logprobs_of(request)[2][1:] == [pytest.approx(math.log(0.5))] * 2 + [NOT] * 3


def test_a_grammar_shows_in_processed_numbers_and_not_in_raw_ones() -> None:
    grammar = SetGrammar({1, 4}, vocab_size=5)
    processed = logprobs_of(make_request(logprobs=wanted(mode=PROCESSED), grammar=grammar))
    assert processed[1] == [4, 4, 1, 0, 2, 3] and processed[2][3:] == [NOT] * 3
    raw = logprobs_of(make_request(logprobs=wanted(), grammar=grammar))
    assert (raw[0], raw[1]) == (4, [4, 2, 3, 0, 4, 1])


def test_forced_tokens_have_the_models_logprobs() -> None:
    request = make_request(logprobs=wanted(2), forced_token_ids=(1,))
    rank, ids, scores = logprobs_of(request)
    assert (rank, ids) == (5, [1, 2, 3])
    assert scores == pytest.approx([exact(LOGITS)[i] for i in ids], rel=1e-6)
    cut = make_request(
        logprobs=wanted(2, mode=PROCESSED), forced_token_ids=(1,), temperature=1.0, top_k=2
    )
    assert logprobs_of(cut)[2] == [NOT, pytest.approx(math.log(0.5)), pytest.approx(math.log(0.5))]


def test_tokens_asked_for_by_id_are_scored_without_a_count() -> None:
    assert logprobs_of(make_request(logprobs=wanted(None, token_ids=(4, 0))))[1] == [2, 4, 0]


def test_who_asks_for_nothing_gets_nothing() -> None:
    for logprobs in (None, wanted(None), wanted(None, num_prompt_logprobs=3)):
        _, result = run(LogitRows(), make_request(logprobs=logprobs), LOGITS)
        assert not result.logprobs


def test_a_row_that_fails_has_no_logprobs() -> None:
    for logits in ([math.nan] * 5, [NOT] * 5):
        _, result = run(LogitRows(), make_request(logprobs=wanted()), logits)
        assert result.errors and not result.logprobs


@pytest.mark.parametrize("mode", LogprobsMode)
def test_prompts_are_scored_by_the_models_own_numbers(mode: LogprobsMode) -> None:
    own = wanted(None, num_prompt_logprobs=1, prompt_token_ids=(4,), mode=mode)
    params = make_params(logprobs=own, temperature=0.5, top_k=1, logit_bias={0: 50.0})
    request = make_request([3, 1, 2, 0], params=params)
    rows: list[FloatRow] = [np.array(LOGITS, np.float32), np.array(LOGITS[::-1], np.float32)]
    scored = LogitRows().score_prompt(rows, request, range(1, 3))
    first, second = unpack(scored)
    assert (scored.position, first[:2], second[:2]) == (1, (5, [1, 2, 4]), (1, [2, 1, 4]))
    is_logit = mode in (LogprobsMode.RAW_LOGITS, LogprobsMode.PROCESSED_LOGITS)
    expected = LOGITS if is_logit else exact(LOGITS)
    assert first[2] == pytest.approx([expected[i] for i in first[1]], rel=1e-6)
