"""Every two values of parameters meet in some request, and each request gets what the definition
says: its tokens, its logprobs, its text, its end. Through the public API, on the fake model and on
a small real one, crowded so that prompts are cut and requests preempted."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import pytest

from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend import (
    AsyncLLMEngine,
    EngineArgs,
    RequestOutputKind,
    SamplingParams,
)
from footplate.frontend.logprobs import FlatLogprobs, LogprobsOnePosition
from footplate.protocol.errors import InvalidParameterError
from tests.backend.logits.reference import adjusted, possible_tokens, processed

from .collecting import Answer, Record, collect, gaps
from .definition import (
    GrammarState,
    Model,
    Score,
    end_of,
    most_tokens,
    processors_of,
    scores_of,
    token_params,
)
from .levels import LEVELS, PARAMS, PROCESSOR, WITHOUT_EFFECT, is_legal, params_of
from .pairwise import Row, covering_rows
from .small_model import EOS_TOKEN_IDS, VOCAB_SIZE, write_small_llama

# Of the covering array. When levels change, "every value makes a difference" may need another one:
# some values have few chances.
SEED = 0
MAX_MODEL_LEN = 64
NUM_BLOCKS = 10  # of 16 tokens: two requests of full length, and a bit
FAKE_VOCAB_SIZE = 2048
DEFAULT_MODE: Literal["processed_logprobs"] = "processed_logprobs"  # of requests that name none

WITHOUT_EFFECT_ON_FAKE = {"ignore_eos", "top_p", "top_k", "min_p"}


def without_effect_on(model: Model) -> set[str]:
    return WITHOUT_EFFECT | (WITHOUT_EFFECT_ON_FAKE if model.is_fake else set())


@cache
def rows() -> list[Row]:
    return covering_rows(LEVELS, is_legal, SEED)


@pytest.fixture(scope="module", params=["fake", "llama"])
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One run for all tests, of each model."""
    if request.param == "fake":
        name, model = "fake", Model(DEMO_MODEL, FAKE_VOCAB_SIZE, (), MAX_MODEL_LEN)
    else:
        folder: Path = tmp_path_factory.mktemp("llama")
        write_small_llama(folder, MAX_MODEL_LEN)
        name, model = str(folder), Model(folder, VOCAB_SIZE, EOS_TOKEN_IDS, MAX_MODEL_LEN)
    without_effect = without_effect_on(model)
    engine_args = EngineArgs(
        model=name,
        device="cpu",
        dtype="float32",
        threads=1,
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=NUM_BLOCKS,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        scheduling_policy="priority",
        max_logprobs=-1,
        logprobs_mode=DEFAULT_MODE,
        logits_processors=(PROCESSOR,),
        reasoning_start_str="(",
        reasoning_end_str=")",
    )

    async def run() -> Record:
        async with AsyncLLMEngine(engine_args) as engine:
            return await collect(engine, model, rows(), without_effect)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        return asyncio.run(run())


# ---- the rows


def test_every_parameter_takes_part() -> None:
    assert tuple(PARAMS) == SamplingParams.__struct_fields__


def test_values_that_do_not_go_together_are_those_that_are_refused() -> None:
    names = list(PARAMS)
    for a, b in product(names, names):
        for i, j in product(range(len(PARAMS[a])), range(len(PARAMS[b]))):
            row = {a: i, b: j}
            try:
                params_of(row)
            except InvalidParameterError:
                assert not is_legal(row), row
            else:
                assert is_legal(row), row


# ---- the run


def test_no_request_fails_and_nothing_is_left_behind(record: Record) -> None:
    for answer in record.answers:
        assert len(answer.completions) == answer.params.n, answer
        for completion in answer.completions:
            assert completion.finish_reason in ("stop", "length", "repetition"), answer
        if answer.params.skip_reading_prefix_cache:
            assert answer.outputs[-1].num_cached_tokens == 0, answer
    for stats in record.stats:
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == NUM_BLOCKS
        assert stats.num_bad_messages == 0
    assert record.stats[0].num_preemptions > 0
    assert record.stats[-1].prefix_cache_hits > 0


def test_every_value_makes_a_difference_somewhere(record: Record) -> None:
    tried = LEVELS.keys() - without_effect_on(record.model)
    expected = {(name, level) for name in tried for level in range(1, len(LEVELS[name]))}
    assert expected - record.effective == set()


def test_asking_for_logprobs_and_company_change_no_token(record: Record) -> None:
    """And completion i of n is the request with seed + i."""
    for answer in record.answers:
        for together, alone in zip(answer.completions, answer.alone, strict=True):
            assert together.token_ids == alone.token_ids, answer
            assert together.text == alone.text, answer
            assert together.finish_reason == alone.finish_reason, answer
            assert together.stop_reason == alone.stop_reason, answer
    seeds = [answer.outputs[-1].seed for answer in record.answers if answer.params.seed is None]
    assert len(set(seeds)) == len(seeds) > 0


# ---- against the definition


class Position(NamedTuple):
    """One token of a completion, and all that it depends on."""

    token_id: int
    logits: list[float]
    prefix: list[int]  # prompt and output before it
    grammar: set[int] | None  # the tokens that it allows
    entries: LogprobsOnePosition | None


def positions_of(answer: Answer, index: int, model: Model) -> Iterator[Position]:
    completion, wanted = answer.completions[index], answer.params.structured_outputs
    state = GrammarState(wanted, model) if wanted is not None else None
    entries = completion.logprobs
    for number, token_id in enumerate(completion.token_ids):
        yield Position(
            token_id,
            answer.logits[index][number],
            answer.prompt + completion.token_ids[:number],
            state.allowed() if state is not None else None,
            entries[number] if entries is not None else None,
        )
        if state is not None:
            state.take(token_id)


def test_every_token_is_one_that_the_definition_allows(record: Record) -> None:
    model = record.model
    for answer in record.answers:
        prompt = answer.prompt
        processors = processors_of(answer.params, prompt, model)
        for index in range(answer.params.n):
            params = answer.params_of(index)
            numbers = token_params(params, model, most_tokens(params, len(prompt), model))
            if model.is_fake:
                numbers = msgspec.structs.replace(numbers, temperature=0.0)
            for token_id, logits, prefix, grammar, _ in positions_of(answer, index, model):
                possible = possible_tokens(
                    logits, prefix, len(prompt), numbers, grammar, processors
                )
                assert token_id in possible, (str(answer), index, len(prefix) - len(prompt))


def test_logprobs_are_those_of_the_definition(record: Record) -> None:
    model, num_scored = record.model, 0
    for answer in record.answers:
        params, count = answer.params, answer.num_logprobs
        mode = params.logprobs_mode or DEFAULT_MODE
        for index, completion in enumerate(answer.completions):
            if count is None:
                assert completion.logprobs is None, answer
                assert completion.cumulative_logprob is None, answer
                continue
            total = 0.0
            for position in positions_of(answer, index, model):
                entries = position.entries
                assert entries is not None, answer
                wanted = (
                    scores_of(
                        row,
                        position.token_id,
                        count,
                        params.logprob_token_ids or (),
                        as_logits=mode.endswith("logits"),
                    )
                    for row in scored_rows(answer, index, position, mode, model)
                )
                where = (str(answer), index, len(position.prefix) - len(answer.prompt))
                assert any(is_close(entries, scores, params, model) for scores in wanted), where
                total += entries[position.token_id].logprob
                num_scored += 1
            assert completion.cumulative_logprob == pytest.approx(total, abs=1e-6), answer
    assert num_scored > 100


def scored_rows(
    answer: Answer, index: int, position: Position, mode: str, model: Model
) -> Iterator[list[float]]:
    """What is scored: one row, or those that rounding at a border could make of it."""
    if mode.startswith("raw"):
        yield position.logits
        return
    params, prompt = answer.params_of(index), answer.prompt
    numbers = token_params(params, model, most_tokens(params, len(prompt), model))
    processors = processors_of(params, prompt, model)
    row = adjusted(
        position.logits, position.prefix, len(prompt), numbers, position.grammar, processors
    )
    for slack in (0.0, -1e-5, 1e-5):
        yield processed(row, numbers, slack)


def test_prompt_logprobs_are_those_of_the_definition(record: Record) -> None:
    model, num_scored = record.model, 0
    for answer in record.answers:
        params, prompt, count = answer.params, answer.prompt, answer.num_prompt_logprobs
        scored = [output.prompt_logprobs for output in answer.outputs]
        if count is None:
            assert scored == [None] * len(scored), answer
            continue
        # Those who put deltas together get it once.
        is_delta = params.output_kind is RequestOutputKind.DELTA
        assert [part is not None for part in scored[1:]] == [not is_delta] * (len(scored) - 1)
        assert scored[0] is not None and len(scored[0]) == len(prompt), answer
        assert isinstance(scored[0], FlatLogprobs) == params.flat_logprobs, answer
        mode = params.logprobs_mode or DEFAULT_MODE
        for position, entries in enumerate(scored[0]):
            if position < max(1, params.prompt_logprob_start):
                assert entries is None, answer
                continue
            wanted = scores_of(
                answer.prompt_logits[position - 1],
                prompt[position],
                count,
                params.prompt_logprob_token_ids or (),
                as_logits=mode.endswith("logits"),
            )
            assert entries is not None, answer
            assert is_close(entries, wanted, params, model), (str(answer), position)
            num_scored += 1
    assert num_scored > 100


def is_close(
    entries: LogprobsOnePosition, wanted: Sequence[Score], params: SamplingParams, model: Model
) -> bool:
    """Whether a position is as it should be: ids, their order and ranks exactly, and numbers as
    well as float32 can tell."""
    if list(entries) != [score.token_id for score in wanted]:
        return False
    return all(
        entry.rank == score.rank
        and math.isclose(entry.logprob, score.number, rel_tol=1e-5, abs_tol=1e-4)
        and entry.decoded_token == (model.text_of(score.token_id) if params.detokenize else None)
        for entry, score in zip(entries.values(), wanted, strict=True)
    )


def test_text_and_end_are_those_of_the_definition(record: Record) -> None:
    reasons = set()
    for answer in record.answers:
        for index, completion in enumerate(answer.completions):
            tokens = completion.token_ids
            assert completion.finish_reason is not None
            params = answer.params_of(index)
            expected = end_of(tokens, len(answer.prompt), params, record.model)
            assert expected == (
                len(tokens),
                completion.finish_reason,
                completion.stop_reason,
                completion.text,
            ), answer
            reasons.add((completion.finish_reason, type(completion.stop_reason)))
    assert reasons >= {("stop", str), ("stop", int), ("stop", type(None))}
    assert reasons >= {("length", type(None)), ("repetition", type(None))}


def test_outputs_are_of_the_kind_that_was_asked_for(record: Record) -> None:
    for answer in record.answers:
        params, outputs = answer.params, answer.outputs
        is_delta = params.output_kind is RequestOutputKind.DELTA
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            assert len(outputs) == 1 and len(outputs[0].outputs) == params.n, answer
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert all(gap >= (params.stream_interval or 1) for gap in gaps(outputs, params)), answer
        before: dict[int, tuple[str, list[int]]] = {}
        for part in (part for output in outputs for part in output.outputs):
            if answer.num_logprobs is not None:
                assert isinstance(part.logprobs, FlatLogprobs) == params.flat_logprobs, answer
                assert part.logprobs is not None and len(part.logprobs) == len(part.token_ids)
            text, token_ids = before.get(part.index, ("", []))
            if not is_delta:
                assert part.text.startswith(text), answer
                assert part.token_ids[: len(token_ids)] == token_ids, answer
            before[part.index] = part.text, part.token_ids
