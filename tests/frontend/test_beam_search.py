"""The search, by hand, on tables of probabilities. Beside transformers' it stands in
`tests/exactness`."""

import random
from math import exp, inf, log

import pytest
import torch

from footplate.frontend.beam_params import BeamSearchParams, EarlyStopping
from footplate.frontend.beam_search import BeamSearch, NextTokens, beam_score
from footplate.protocol.messages import FinishReason

A, B, C, EOS, EOT = range(5)
Row = dict[int, float]
# What follows an output, by probability; `None` is the end of a grammar.
Table = dict[tuple[int, ...], Row | None]

# Greedy decoding takes A A, of probability 0.3; B B has 0.36.
GARDEN: Table = {
    (): {A: 0.6, B: 0.4},
    (A,): {A: 0.5, B: 0.3, C: 0.2},
    (B,): {A: 0.1, B: 0.9},
}


def look_up(row: Row | None) -> NextTokens:
    if row is None:
        return NextTokens(is_complete=True)
    best = sorted(row, key=lambda token_id: -row[token_id])
    return NextTokens(best, [log(row[token_id]) if row[token_id] else -inf for token_id in best])


def step(search: BeamSearch, table: Table) -> None:
    search.advance([look_up(table[tuple(beam)]) for beam in search.beams])


def found(search: BeamSearch, table: Table) -> list[list[int]]:
    while not search.is_finished:
        step(search, table)
    return [output.token_ids for output in search.outputs]


# ---- by hand


def test_two_beams_find_what_greedy_search_misses() -> None:
    assert found(BeamSearch(1, 2), GARDEN) == [[A, A]]
    search = BeamSearch(2, 2)
    assert found(search, GARDEN) == [[B, B], [A, A]]
    best = search.outputs[0]
    assert exp(best.cumulative_logprob) == pytest.approx(0.36)
    assert best.score == pytest.approx(best.cumulative_logprob / 2)
    assert (best.finish_reason, best.has_eos) == (FinishReason.LENGTH, False)


def test_beams_stand_best_first() -> None:
    search = BeamSearch(3, 3)
    step(search, GARDEN)
    assert search.beams == [[A], [B]]  # there are no more than two first tokens
    step(search, GARDEN)
    assert search.beams == [[B, B], [A, A], [A, B]]


def test_an_ended_beam_is_an_output_and_goes_no_further() -> None:
    table: Table = {(): {EOS: 0.6, A: 0.3, B: 0.1}, (A,): {A: 0.9, EOS: 0.1}, (B,): {A: 1.0}}
    search = BeamSearch(2, 2, [EOS])
    step(search, table)
    assert search.beams == [[A], [B]]
    assert [output.token_ids for output in search.outputs] == [[EOS]]
    assert not search.is_finished
    assert found(search, table) == [[EOS], [A, A]]
    assert [output.finish_reason for output in search.outputs] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    assert [output.has_eos for output in search.outputs] == [True, False]


def test_only_the_best_candidates_may_end() -> None:
    """Two are better than the end of sequence: it is no output, though it is no beam either."""
    table: Table = {(): {A: 0.4, B: 0.3, EOS: 0.2, C: 0.1}}
    search = BeamSearch(2, 5, [EOS])
    step(search, table)
    assert search.beams == [[A], [B]]
    assert not search.outputs


def test_every_end_of_sequence_token_ends_a_beam() -> None:
    table: Table = {(): {EOS: 0.4, EOT: 0.3, A: 0.2, B: 0.1}}
    search = BeamSearch(2, 5, [EOS, EOT], early_stopping=True)
    assert search.num_candidates == 4  # all of them are needed for two beams that go on
    assert found(search, table) == [[EOS], [EOT]]


def test_ignored_end_of_sequence_tokens_are_tokens_like_others() -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=2, ignore_eos=True)
    search = BeamSearch.of(params, [EOS])
    assert found(search, {(): {EOS: 1.0}, (EOS,): {EOS: 1.0}}) == [[EOS, EOS]]
    assert search.outputs[0].finish_reason is FinishReason.LENGTH
    assert search.num_candidates == 1


# Of two beams A goes on with certainty; B ends, as C does in the step after.
LATE: Table = {
    (): {A: 0.5, EOS: 0.3, B: 0.2},
    (A,): {A: 0.9, EOS: 0.1},
    (B,): {EOS: 1.0},
    (A, A): {A: 0.9, EOS: 0.1},
    (A, A, A): {EOS: 1.0},
}


@pytest.mark.parametrize(
    ("length_penalty", "expected"),
    [
        (0.0, [[A, A, A, EOS], [EOS]]),  # 0.405 and 0.3
        (1.0, [[A, A, A, EOS], [B, EOS]]),  # -0.226 and -0.805 per token
        (-1.0, [[EOS], [B, EOS]]),  # -1.204 and -3.219, against -3.615
    ],
)
def test_the_length_penalty_decides_between_short_and_long(
    length_penalty: float, expected: list[list[int]]
) -> None:
    search = BeamSearch(2, 9, [EOS], length_penalty, early_stopping="never")
    assert found(search, LATE) == expected


def test_an_early_stop_takes_the_first_outputs() -> None:
    search = BeamSearch(2, 9, [EOS], early_stopping=True)
    assert found(search, LATE) == [[B, EOS], [EOS]]


# With two outputs there, beam A is worse than both at its length, and could be better at its end.
HOPE: Table = {
    (): {EOS: 0.5, EOT: 0.3, A: 0.2, B: 0.0},
    **{(A,) * n: {A: 1.0} for n in range(1, 9)},
}


def test_without_hope_at_its_length_the_search_ends() -> None:
    search = BeamSearch(2, 9, [EOS, EOT])
    step(search, HOPE)
    assert search.is_finished


def test_never_goes_on_while_more_tokens_could_help() -> None:
    search = BeamSearch(2, 9, [EOS, EOT], early_stopping="never")
    assert found(search, HOPE) == [[A] * 9, [EOS]]
    search = BeamSearch(2, 9, [EOS, EOT], 0.0, early_stopping="never")
    step(search, HOPE)
    assert search.is_finished  # without a penalty they could not


@pytest.mark.parametrize("early_stopping", [False, "never"])
def test_where_length_costs_hope_is_in_the_length_that_a_beam_has(
    early_stopping: EarlyStopping,
) -> None:
    table = LATE | {(A, A): {EOS: 1.0}}
    search = BeamSearch(2, 9, [EOS], -1.0, early_stopping)
    assert found(search, table) == [[EOS], [A, A, EOS]]  # better than B EOS


def test_an_equal_score_neither_goes_on_nor_comes_before_what_was_found_first() -> None:
    table: Table = {
        (): {B: 0.5, EOS: 0.25, EOT: 0.25},
        (B,): {EOS: 0.5, B: 0.5},
    }
    search = BeamSearch(2, 9, [EOS], 0.0)
    step(search, table)
    assert search.beams == [[B], [EOT]]
    search.advance([look_up(table[(B,)]), NextTokens()])
    assert [output.token_ids for output in search.outputs] == [[EOS], [B, EOS]]
    assert search.is_finished  # though B B is as likely


def test_one_beam_ends_where_its_first_output_does() -> None:
    table: Table = {(): {EOS: 0.6, A: 0.4}, (A,): {A: 1.0}}
    assert found(BeamSearch(1, 2, [EOS], early_stopping="never"), table) == [[EOS]]


def test_equal_scores_stand_in_the_order_of_beams_then_of_tokens() -> None:
    search = BeamSearch(4, 2)
    even = NextTokens([3, 1, 2, 0], [log(0.25)] * 4)
    search.advance([even])
    assert search.beams == [[0], [1], [2], [3]]
    search.advance([even] * 4)
    assert [output.token_ids for output in search.outputs] == [[0, 0], [0, 1], [0, 2], [0, 3]]


# ---- with a grammar


def test_impossible_tokens_are_no_candidates() -> None:
    table: Table = {(): {A: 1.0, B: 0.0, C: 0.0}, (A,): {B: 1.0, C: 0.0}}
    assert found(BeamSearch(3, 2), table) == [[A, B]]


def test_a_complete_beam_is_an_output_without_a_token_more() -> None:
    """Two choices, A B and B: there are no more outputs than these."""
    table: Table = {(): {A: 0.3, B: 0.7}, (A,): {B: 1.0}, (B,): None, (A, B): None}
    search = BeamSearch(3, 9)
    assert found(search, table) == [[B], [A, B]]
    assert search.is_finished
    assert not search.beams
    for output in search.outputs:
        assert (output.finish_reason, output.has_eos) == (FinishReason.STOP, False)
    # The end counts as a token.
    assert search.outputs[0].score == pytest.approx(log(0.7) / 2)
    assert search.outputs[1].score == pytest.approx(log(0.3) / 3)


def test_a_complete_beam_competes_with_the_next_tokens_of_others() -> None:
    table: Table = {(): {A: 0.6, B: 0.4}, (A,): {A: 0.5, B: 0.5}, (B,): None}
    search = BeamSearch(2, 3)
    step(search, table)
    step(search, table)
    assert [output.token_ids for output in search.outputs] == [[B]]  # 0.4, against 0.3 twice
    assert search.beams == [[A, A], [A, B]]


def test_a_grammar_of_nothing_has_one_empty_output() -> None:
    search = BeamSearch(2, 3, length_penalty=-1.0)
    assert found(search, {(): None}) == [[]]
    assert (search.outputs[0].score, search.outputs[0].cumulative_logprob) == (0.0, 0.0)


# ---- scores


def test_scores_are_rounded_as_float32_arithmetic_rounds() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        logprob = torch.tensor(-100 * generator.random())
        length, penalty = generator.randint(1, 3000), generator.uniform(-5, 5)
        expected = (logprob / (length**penalty)).item()
        assert beam_score(logprob.item(), length, penalty) == expected


def test_sums_are_rounded_as_float32_arithmetic_rounds() -> None:
    logprobs = (-3 * torch.rand(500, generator=torch.Generator().manual_seed(0))).tolist()
    search = BeamSearch(1, 500)
    total = torch.zeros(())
    for logprob in logprobs:
        search.advance([NextTokens([A], [logprob])])
        total = total + logprob
    assert search.outputs[0].cumulative_logprob == total.item()
