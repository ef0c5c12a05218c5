"""Runs the rows of a covering array through an engine: all of them at once, each of their
completions alone, and each once more with a value set back to its default."""

import asyncio
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.runner.fake_rows import pseudo_logits
from footplate.frontend import (
    AsyncLLMEngine,
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from footplate.protocol.messages import Stats

from .definition import Model, token_params
from .levels import ARGUMENTS, LEVELS, PARAMS, describe, params_of
from .pairwise import Row

FIRST_FAKE_ID = 16  # the fake model says none below
Logits = list[float]


@dataclass
class Answer:
    """What became of one row.

    Attributes:
        outputs: of the stream, as they came.
        alone: each completion as a request of its own, that asks for raw logits.
        logits: of each completion, at each output position.
        prompt_logits: behind each token of the prompt but the last one.
    """

    row: Row
    params: SamplingParams
    outputs: list[RequestOutput]
    alone: list[CompletionOutput] = field(default_factory=list)
    logits: list[list[Logits]] = field(default_factory=list)
    prompt_logits: list[Logits] = field(default_factory=list)

    @property
    def completions(self) -> list[CompletionOutput]:
        """Each as a whole, whatever kind of outputs it came in."""
        return whole_completions(self.outputs, self.params)

    def __str__(self) -> str:
        return f"seed {self.outputs[-1].seed}, {describe(self.row)}"

    @property
    def prompt(self) -> list[int]:
        """Its token ids."""
        return self.outputs[-1].prompt_token_ids

    @property
    def num_logprobs(self) -> int | None:
        """How many most likely tokens were asked for; None where nothing was."""
        params = self.params
        return 0 if params.logprobs is None and params.logprob_token_ids else params.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Likewise, for the prompt."""
        params = self.params
        count, ids = params.prompt_logprobs, params.prompt_logprob_token_ids
        return 0 if count is None and ids else count

    def params_of(self, index: int) -> SamplingParams:
        """Of the request that completion `index` is equal to."""
        seed = (self.outputs[-1].seed + index) % 2**63
        return msgspec.structs.replace(self.params, n=1, seed=seed)


@dataclass
class Record:
    """All that was seen of one engine.

    Attributes:
        stats: its books when all rows had run at once, and at the end.
        effective: levels without which some answer is another one.
    """

    model: Model
    answers: list[Answer] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)
    effective: set[tuple[str, int]] = field(default_factory=set)


async def collect(
    engine: AsyncLLMEngine, model: Model, rows: Sequence[Row], without_effect: Set[str]
) -> Record:
    """Run everything.

    Args:
        without_effect: parameters that make no difference on this model.
    """
    record = Record(model)
    async with asyncio.timeout(120):
        outputs = await asyncio.gather(*(ask(engine, params_of(row), row) for row in rows))
        record.stats.append(await engine.get_stats())
        for row, seen in zip(rows, outputs, strict=True):
            answer = Answer(row, params_of(row), seen)
            await _ask_alone(engine, answer, model)
            record.answers.append(answer)
        record.effective = await _effective_levels(engine, rows, without_effect)
        record.stats.append(await engine.get_stats())
    return record


async def ask(engine: AsyncLLMEngine, params: SamplingParams, row: Row) -> list[RequestOutput]:
    """The outputs of a request with a row's arguments."""
    values: dict[str, Any] = {name: ARGUMENTS[name][row[name]] for name in ARGUMENTS}
    prompt, age = values.pop("prompt"), values.pop("arrival_time")
    arrival = None if age is None else time.time() - age
    try:
        stream = engine.generate(prompt, params, arrival_time=arrival, **values)
        return [output async for output in stream]
    except Exception as error:
        error.add_note(describe(row))
        raise


async def _ask_alone(engine: AsyncLLMEngine, answer: Answer, model: Model) -> None:
    for index in range(answer.params.n):
        # All numbers of a large vocabulary would take long, and the fake model's are known.
        params = msgspec.structs.replace(
            answer.params_of(index),
            logprobs=5 if model.is_fake else -1,
            logprobs_mode="raw_logits",
            prompt_logprobs=None,
            prompt_logprob_token_ids=None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        [output] = await ask(engine, params, answer.row)
        [completion] = output.outputs
        answer.alone.append(completion)
        assert completion.logprobs is not None
        logits = []
        for position, entries in enumerate(completion.logprobs):
            assert entries is not None
            if model.is_fake:
                prefix = answer.prompt + completion.token_ids[:position]
                logits.append(_fake_logits(prefix, position, params, model))
                assert all(score.logprob == logits[-1][i] for i, score in entries.items()), answer
            else:
                logits.append([entries[i].logprob for i in range(model.vocab_size)])
        answer.logits.append(logits)
    if model.is_fake:
        prefixes = [answer.prompt[:length] for length in range(1, len(answer.prompt))]
        params = answer.params_of(0)
        answer.prompt_logits = [_fake_logits(p, sys.maxsize, params, model) for p in prefixes]
    else:
        scoring = SamplingParams(
            max_tokens=1, seed=0, prompt_logprobs=-1, logprobs_mode="raw_logits"
        )
        scores = (await ask(engine, scoring, answer.row))[-1].prompt_logprobs
        assert scores is not None
        for entries in list(scores)[1:]:
            assert entries is not None
            answer.prompt_logits.append([entries[i].logprob for i in range(model.vocab_size)])


def _fake_logits(
    prefix: list[int], position: int, params: SamplingParams, model: Model
) -> list[float]:
    numbers = token_params(params, model, max_tokens=1)
    digest, size = digest_prefix(prefix), model.vocab_size
    likeliest = next_token(digest, position, numbers, size, FIRST_FAKE_ID)
    row: list[float] = pseudo_logits(digest, likeliest, numbers, size, FIRST_FAKE_ID).tolist()
    return row


def whole_completions(
    outputs: Sequence[RequestOutput], params: SamplingParams
) -> list[CompletionOutput]:
    """What all outputs of a request come to."""
    parts: list[list[CompletionOutput]] = [[] for _ in range(params.n)]
    for output in outputs:
        for part in output.outputs:
            parts[part.index].append(part)
    if params.output_kind is not RequestOutputKind.DELTA:
        return [each[-1] for each in parts]
    return [
        msgspec.structs.replace(
            each[-1],
            text="".join(part.text for part in each),
            token_ids=[token_id for part in each for token_id in part.token_ids],
            logprobs=None
            if each[-1].logprobs is None
            else [entries for part in each for entries in part.logprobs or ()],
        )
        for each in parts
    ]


def gaps(outputs: Sequence[RequestOutput], params: SamplingParams) -> list[int]:
    """Tokens from one output to the next, of each completion; without the first and the last
    output, which come when they come."""
    counts: list[list[int]] = [[] for _ in range(params.n)]
    for output in outputs:
        for part in output.outputs:
            before = counts[part.index][-1] if counts[part.index] else 0
            is_delta = params.output_kind is RequestOutputKind.DELTA
            counts[part.index].append(len(part.token_ids) + (before if is_delta else 0))
    return [b - a for each in counts for a, b in pairwise(each[:-1])]


async def _effective_levels(
    engine: AsyncLLMEngine, rows: Sequence[Row], without_effect: Set[str]
) -> set[tuple[str, int]]:
    """Levels that change the answer of some row: it is another one with the default instead.

    Args:
        without_effect: parameters that are not tried.
    """
    users = {
        (name, level): [row for row in rows if row[name] == level]
        for name in LEVELS.keys() - without_effect
        for level in range(1, len(LEVELS[name]))
    }
    effective: set[tuple[str, int]] = set()
    for attempt in range(max(map(len, users.values()))):
        waiting = [
            (key, own[attempt])
            for key, own in users.items()
            if key not in effective and attempt < len(own)
        ]
        differs = await asyncio.gather(*(_differs(engine, row, name) for (name, _), row in waiting))
        effective |= {key for (key, _), differ in zip(waiting, differs, strict=True) if differ}
    return effective


async def _differs(engine: AsyncLLMEngine, row: Row, name: str) -> bool:
    row = row.copy()
    if name != "seed" and PARAMS["seed"][row["seed"]] is None:
        row["seed"] = 0  # two drawn ones would differ
    for other in ("logprobs", "prompt_logprobs"):
        if name != other and PARAMS[other][row[other]] == -1:
            row[other] = PARAMS[other].index(0)  # all numbers would only take long
    seen = []
    for variant in ({**row, name: 0}, row):
        params = params_of(variant)
        outputs = await ask(engine, params, variant)
        seen.append(_observed(outputs, params, name))
    return seen[0] != seen[1]


def _observed(outputs: list[RequestOutput], params: SamplingParams, name: str) -> list[Any]:
    """What a user could tell two answers by. How many outputs there are, and what the cache has,
    depends on the clock and on others: that is looked at where it is meant only."""
    last = outputs[-1]
    seen: list[Any] = [last.seed]
    for part in whole_completions(outputs, params):
        seen += [part.token_ids, part.text, part.finish_reason, part.stop_reason]
        seen += [part.cumulative_logprob, list(part.logprobs or ())]
    scores = outputs[0].prompt_logprobs
    seen.append(None if scores is None else list(scores))
    if name == "flat_logprobs":
        seen += [type(scores), *(type(part.logprobs) for part in last.outputs)]
    if name == "output_kind":
        seen += [len(outputs) == 1, len(last.outputs[0].token_ids)]
    if name == "stream_interval":
        seen.append(min(gaps(outputs, params), default=0))
    return seen
