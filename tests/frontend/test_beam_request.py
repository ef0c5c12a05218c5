"""A beam search over an engine: its requests, their ends, and the text of what is found."""

import asyncio
from collections.abc import Callable
from math import inf, log
from typing import Any

import pytest

from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.beam_request import (
    BeamScorer,
    RequestScorer,
    as_completions,
    run_beam_search,
)
from footplate.frontend.beam_search import BeamOutput, BeamSearch, NextTokens
from footplate.frontend.text import Tokenizer, load_tokenizer
from footplate.protocol.errors import EngineDeadError, FootplateError, RequestFailedError
from footplate.protocol.messages import FinishReason, ModelFacts
from footplate.protocol.token_params import Grammar, LogprobsMode, TokenParams

A, B, C, EOS = range(4)
MODEL = ModelFacts("m", "m", "llama", 100, 64, (EOS, 50), "float32", "cpu", "torch")
EVEN = NextTokens([A, B], [log(0.5), log(0.5)])


class Engine:
    """Scores beams as it is told, and remembers what it was asked.

    Args:
        answer: what may follow some output, or an error to raise.
    """

    def __init__(self, answer: Callable[[list[int]], NextTokens | FootplateError]) -> None:
        self._answer = answer
        self.asked: list[tuple[list[int], TokenParams]] = []
        self.aborted: list[list[int]] = []
        self.hold: list[list[int]] = []  # beams that get no answer
        self.num_waiting = 0
        self.all_wait = asyncio.Event()

    async def __call__(self, prior_token_ids: list[int], params: TokenParams) -> NextTokens:
        self.asked.append((prior_token_ids, params))
        if prior_token_ids in self.hold:
            await self._wait_in_vain(prior_token_ids)
        answer = self._answer(prior_token_ids)
        if isinstance(answer, FootplateError):
            raise answer
        return answer

    async def _wait_in_vain(self, prior_token_ids: list[int]) -> None:
        self.num_waiting += 1
        if self.num_waiting == len(self.hold):
            self.all_wait.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.aborted.append(prior_token_ids)
            raise


def a_search(**options: Any) -> BeamSearchParams:
    return BeamSearchParams(**({"beam_width": 2, "max_tokens": 3} | options))


def start(
    engine: Engine, params: BeamSearchParams, grammar: Grammar | None = None
) -> "asyncio.Task[list[BeamOutput]]":
    scorer: BeamScorer = RequestScorer(engine, params, MODEL, grammar)
    search = BeamSearch.of(params, MODEL.eos_token_ids)
    return asyncio.ensure_future(run_beam_search(search, scorer))


# ---- requests


async def test_every_beam_is_a_request_for_one_token_behind_it() -> None:
    engine = Engine(lambda beam: EVEN)
    await start(engine, a_search())
    assert [beam for beam, _ in engine.asked] == [[], [A], [B], [A, A], [A, B]]
    for beam, params in engine.asked:
        assert params.max_tokens == len(beam) + 1
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)
        assert set(params.stop_token_ids) == {EOS, 50}
        assert params.logprobs is not None
        assert params.logprobs.num_logprobs == 4  # two beams, two tokens that end them
        assert params.logprobs.mode is LogprobsMode.PROCESSED_LOGPROBS
        assert (params.adjustments, params.grammar, params.repetition) == (None, None, None)


async def test_requests_carry_temperature_and_grammar() -> None:
    engine = Engine(lambda beam: EVEN)
    grammar = Grammar("start: /[ab]*/")
    await start(engine, a_search(temperature=2, ignore_eos=True), grammar)
    for _, params in engine.asked:
        assert (params.temperature, params.grammar, params.stop_token_ids) == (2.0, grammar, ())
        assert params.logprobs is not None
        assert params.logprobs.num_logprobs == 2


async def test_no_more_candidates_are_asked_for_than_there_are_tokens() -> None:
    engine = Engine(lambda beam: EVEN)
    model = ModelFacts("m", "m", "llama", 5, 64, (EOS,), "float32", "cpu", "torch")
    await RequestScorer(engine, a_search(), model).score([[]], 12)
    assert engine.asked[0][1].logprobs is not None
    assert engine.asked[0][1].logprobs.num_logprobs == 5


async def test_a_steps_requests_are_under_way_together_and_may_end_in_any_order() -> None:
    second_has_ended = asyncio.Event()

    async def score_beam(prior_token_ids: list[int], params: TokenParams) -> NextTokens:
        if prior_token_ids == [A]:
            await second_has_ended.wait()
            return NextTokens([A], [log(0.1)])
        second_has_ended.set()
        return NextTokens([B], [log(0.9)])

    scored = await RequestScorer(score_beam, a_search(), MODEL).score([[A], [B]], 4)
    assert [following.token_ids for following in scored] == [[A], [B]]


async def test_a_complete_grammar_ends_a_beam() -> None:
    """Of `A B` and `B`; tokens that a grammar forbids are -inf."""
    rows = {
        (): NextTokens([B, A, C], [log(0.7), log(0.3), -inf]),
        (A,): NextTokens([B, A], [0.0, -inf]),
        (B,): NextTokens(is_complete=True),
        (A, B): NextTokens(is_complete=True),
    }
    engine = Engine(lambda beam: rows[tuple(beam)])
    outputs = await start(engine, a_search(max_tokens=9), Grammar("choice"))
    assert [output.token_ids for output in outputs] == [[B], [A, B]]
    assert {output.finish_reason for output in outputs} == {FinishReason.STOP}


# ---- ends


@pytest.mark.parametrize("error", [RequestFailedError("grammar"), EngineDeadError("killed")])
async def test_an_error_of_one_request_aborts_the_others_and_ends_the_search(
    error: FootplateError,
) -> None:
    engine = Engine(lambda beam: error if beam == [B] else EVEN)
    engine.hold = [[A]]
    with pytest.raises(type(error)) as caught:
        await start(engine, a_search())
    assert caught.value is error
    assert engine.aborted == [[A]]


async def test_leaving_the_search_aborts_all_its_requests() -> None:
    engine = Engine(lambda beam: EVEN)
    engine.hold = [[A], [B]]
    task = start(engine, a_search())
    await engine.all_wait.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(engine.aborted) == [[A], [B]]  # a task group keeps no order
    assert len(engine.asked) == 3


# ---- what the user gets


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(DEMO_MODEL))


WORDS = [434, 495]  # of the demo model's vocabulary
END = 4
MARK = 2  # a special token that ends nothing


def text_of(tokenizer: Tokenizer | None, output: BeamOutput, **options: Any) -> str:
    prompt = [0, *WORDS]
    [completion] = as_completions([output], prompt, a_search(**options), tokenizer)
    assert completion.token_ids == output.token_ids
    return completion.text


def test_the_text_ends_before_the_end_of_sequence_unless_it_is_wanted(tokenizer: Tokenizer) -> None:
    words = tokenizer.detokenizer([0, *WORDS]).feed(WORDS)
    output = BeamOutput([*WORDS, END], -1.0, -0.5, FinishReason.STOP, True)
    assert text_of(tokenizer, output) == words
    assert text_of(tokenizer, output, include_stop_str_in_output=True) == words + "<|end|>"


def test_other_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    words = tokenizer.detokenizer([0, *WORDS]).feed(WORDS)
    output = BeamOutput([MARK, *WORDS, END], -1.0, -0.5, FinishReason.STOP, True)
    shown = text_of(tokenizer, output, include_stop_str_in_output=True)
    assert shown == words + "<|end|>"
    # Ignored, it is one like others.
    output = BeamOutput([MARK, *WORDS, END], -1.0, -0.5, FinishReason.LENGTH, False)
    assert text_of(tokenizer, output, include_stop_str_in_output=True) == words


def test_an_unfinished_character_is_shown_as_such(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False)[:-1]
    assert half
    output = BeamOutput(half, -1.0, -0.5, FinishReason.LENGTH, False)
    assert text_of(tokenizer, output) == "\ufffd"


def test_outputs_are_completions_best_first_with_their_log_probability() -> None:
    outputs = [
        BeamOutput([A, B], -0.5, -0.25, FinishReason.LENGTH, False),
        BeamOutput([EOS], -0.75, -0.75, FinishReason.STOP, True),
        BeamOutput([], 0.0, 0.0, FinishReason.STOP, False),
    ]
    made = as_completions(outputs, [A], a_search(), None)
    assert [
        (c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason, c.cumulative_logprob)
        for c in made
    ] == [
        (0, "", [A, B], "length", None, -0.5),
        (1, "", [EOS], "stop", None, -0.75),
        (2, "", [], "stop", None, 0.0),
    ]
