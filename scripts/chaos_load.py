"""A load of every kind of request there is, each of which is compared with the same request run
undisturbed: token by token, text by text, logprob by logprob."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from random import Random
from typing import Any

import msgspec

from footplate.frontend import (
    AsyncLLMEngine,
    BeamSearchParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from footplate.frontend.prompts import Prompt
from footplate.protocol.errors import FootplateError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 12},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
# Every character takes several bytes, and most of them several tokens: any cut is inside of one.
MULTI_BYTE = "[äöüß€漢字🚂🔥]{30,60}"
TEXTS = (
    "The function returns a",
    "Größe und Gewicht: äöü €",
    "漢字かな交じり文 🚂🔥 and more",
    "def main():\n    ",
)
LENGTHS = (1, 7, 33, 150, 400)


@dataclass(frozen=True)
class Template:
    """One request of the load.

    Attributes:
        needs_seed: sampled without a seed, so that the same request has the one its output told.
    """

    kind: str
    prompt: Prompt
    params: SamplingParams | BeamSearchParams
    priority: int = 0
    needs_seed: bool = False

    @property
    def tells_progress(self) -> bool:
        """Whether there are outputs before the last."""
        if isinstance(self.params, BeamSearchParams):
            return False
        return self.params.output_kind is not RequestOutputKind.FINAL_ONLY

    @property
    def width(self) -> int:
        """How many requests of the core it is at once."""
        params = self.params
        return params.beam_width if isinstance(params, BeamSearchParams) else params.n


def make_templates(count: int, seed: int, vocab_size: int) -> list[Template]:
    """So many requests, of every kind in turn; the seed decides the rest."""
    dice = Random(seed)
    return [_make_template(number, dice, vocab_size) for number in range(count)]


def _make_template(number: int, dice: Random, vocab_size: int) -> Template:
    kinds = tuple(_KINDS.items())
    kind, given = kinds[number % len(kinds)]
    length = dice.choice(LENGTHS)
    prompt: Prompt = [dice.randrange(16, vocab_size) for _ in range(length)]
    if dice.random() < 0.4:
        prompt = dice.choice(TEXTS) + " " * dice.randrange(3)
    if kind == "beams":
        return Template(kind, prompt, BeamSearchParams(beam_width=3, max_tokens=20))
    asked: dict[str, Any] = {
        "temperature": dice.choice((0.5, 1.0, 1.3)),
        "max_tokens": dice.choice((20, 100, 250)),
        "seed": dice.randrange(2**60),
        "output_kind": dice.choice((RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA)),
        "ignore_eos": dice.random() < 0.5,
        **given,
    }
    params = SamplingParams(**asked)
    needs_seed = params.seed is None and params.temperature > 0
    return Template(kind, prompt, params, dice.randrange(-1, 3), needs_seed)


_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"top_p": 0.9, "top_k": 50},
    "without a seed": {"seed": None},
    "penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {20: 1.5, 300: -2.0},
    },
    "min_tokens": {"min_tokens": 15, "stop_token_ids": list(range(100, 400))},
    "stop strings": {"stop": ["ing", "th", "äö"], "min_tokens": 10},
    "n": {"n": 3},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1, "logprob_token_ids": [20]},
    "schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "max_tokens": 200},
    "multi-byte": {
        "structured_outputs": StructuredOutputsParams(regex=MULTI_BYTE),
        "max_tokens": 250,
    },
    "at the end": {"output_kind": RequestOutputKind.FINAL_ONLY, "n": 2, "logprobs": 0},
    "in steps": {"stream_interval": 5},
    "tokens alone": {"detokenize": False, "max_tokens": 400},
    "beams": {},
}


@dataclass
class Completion:
    """All that a consumer has got of one completion."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None


@dataclass
class Answer:
    """All that a consumer has got of one request.

    Attributes:
        took_back: whether an output did not go on where the one before had ended.
    """

    seed: int = 0
    prompt_logprobs: Any = None
    completions: dict[int, Completion] = field(default_factory=dict)
    took_back: bool = False

    def add(self, output: RequestOutput, *, is_delta: bool) -> int:
        """Take one output; how many tokens were new."""
        self.seed = output.seed
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = list(output.prompt_logprobs)
        num_new = 0
        for part in output.outputs:
            has = self.completions.setdefault(part.index, Completion())
            before = len(has.token_ids)
            if is_delta:
                has.token_ids += part.token_ids
                has.text += part.text
                has.logprobs += part.logprobs or ()
            else:
                self.took_back |= part.token_ids[:before] != has.token_ids
                self.took_back |= not part.text.startswith(has.text)
                has.token_ids, has.text = part.token_ids, part.text
                has.logprobs = list(part.logprobs or ())
            has.finish_reason, has.stop_reason = part.finish_reason, part.stop_reason
            has.cumulative_logprob = part.cumulative_logprob
            num_new += len(has.token_ids) - before
        return num_new


@dataclass
class Damage:
    """What a disturbance has cost. Tokens, except where the text or a logprob alone is wrong:
    those count as one that was changed."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0

    def add(self, expected: Answer, got: Answer) -> bool:
        """Compare two answers to one request; whether they differ."""
        before = (self.lost, self.doubled, self.changed)
        self.doubled += got.took_back
        for index in expected.completions.keys() | got.completions.keys():
            wanted = expected.completions.get(index, Completion())
            has = got.completions.get(index, Completion())
            if wanted.token_ids != has.token_ids:
                self._add_tokens(wanted.token_ids, has.token_ids)
            elif wanted != has:
                self.changed += 1
        self.changed += expected.prompt_logprobs != got.prompt_logprobs
        return (self.lost, self.doubled, self.changed) != before

    def _add_tokens(self, expected: Sequence[int], got: Sequence[int]) -> None:
        matcher = SequenceMatcher(None, expected, got, autojunk=False)
        for kind, start, end, got_start, got_end in matcher.get_opcodes():
            if kind == "delete":
                self.lost += end - start
            elif kind == "insert":
                self.doubled += got_end - got_start
            elif kind == "replace":
                self.changed += max(end - start, got_end - got_start)


async def ask(
    engine: AsyncLLMEngine, template: Template, on_tokens: Callable[[int], object]
) -> Answer:
    """Make the request and read it to its end.

    Args:
        on_tokens: called with the number of new tokens of each output.
    """
    answer, params = Answer(), template.params
    if isinstance(params, BeamSearchParams):
        stream = engine.beam_search(template.prompt, params, priority=template.priority)
        is_delta = False
    else:
        # Deadlines that are far away: their clock goes on in another core.
        stream = engine.generate(
            template.prompt, params, priority=template.priority, deadline_s=86_400.0
        )
        is_delta = params.output_kind is RequestOutputKind.DELTA
    async for output in stream:
        on_tokens(answer.add(output, is_delta=is_delta))
    return answer


class Load:
    """Owns streams that are always busy, and the answers that they should get.

    Attributes:
        num_asked: requests that the core may have now: each of `n`, and each beam, is one.
        failures: requests that ended with an error, by kind and words.
    """

    def __init__(self, templates: Sequence[Template]) -> None:
        self._templates = templates
        self._expected: list[Answer] = []
        self._without_seed: list[tuple[int, Answer]] = []
        self._is_over = False
        self._rest = 0.0
        self._token_came = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._running: set[int] = set()  # workers whose request says how far it is
        self._silent: set[int] = set()  # those of them that have not been heard of lately
        self.damage = Damage()
        self.num_asked = 0
        self.num_streams = 0
        self.num_tokens = 0
        self.failures: list[str] = []
        self.differences: list[str] = []
        self._last_token = time.monotonic()
        self._longest_gap_s = 0.0

    async def learn(self, engine: AsyncLLMEngine, width: int) -> None:
        """Run every request once, undisturbed, so many at a time."""
        self._expected = await _ask_all(engine, self._templates, width)

    def begin(self, engine: AsyncLLMEngine, num_streams: int, rest: float = 0.0) -> None:
        """Keep so many streams busy.

        Args:
            rest: how long each pauses after a request, as a multiple of what that took.
        """
        self._is_over = False
        self._rest = rest
        self._workers = [
            asyncio.create_task(self._work(engine, first, num_streams))
            for first in range(num_streams)
        ]

    async def end(self) -> None:
        """Let those that run come to their end."""
        self._is_over = True
        await asyncio.gather(*self._workers)

    async def check_rest(self, engine: AsyncLLMEngine, width: int) -> None:
        """Run those again, undisturbed, whose seed nobody knew before."""
        pending, self._without_seed = self._without_seed, []
        again = []
        for number, answer in pending:
            template = self._templates[number]
            assert isinstance(template.params, SamplingParams)
            params = msgspec.structs.replace(template.params, seed=answer.seed)
            again.append(Template(template.kind, template.prompt, params, template.priority))
        expected = await _ask_all(engine, again, width)
        for template, wanted, (_, got) in zip(again, expected, pending, strict=True):
            self._compare(template.kind, wanted, got)

    async def next_token(self, timeout_s: float) -> None:
        """Wait until another output comes, to any stream. Raises TimeoutError."""
        self._token_came.clear()
        async with asyncio.timeout(timeout_s):
            await self._token_came.wait()

    def take_longest_gap(self) -> float:
        """Most seconds from one output to the next, of all streams, since this was last asked."""
        longest, self._longest_gap_s = self._longest_gap_s, 0.0
        return longest

    async def all_go_on(self, timeout_s: float) -> None:
        """Wait until every request that runs now has a new token, or has ended. Raises
        TimeoutError.

        A request that has none between three deaths in a row of its core is taken to be their
        reason, and rightly so.
        """
        waiting = self._silent = set(self._running)
        async with asyncio.timeout(timeout_s):
            while waiting:
                await self.next_token(timeout_s)

    async def _work(self, engine: AsyncLLMEngine, number: int, stride: int) -> None:
        first = number
        while not self._is_over:
            template = self._templates[number % len(self._templates)]
            if template.tells_progress:
                self._running.add(first)
            self.num_asked += template.width
            since = time.monotonic()
            try:
                got = await ask(engine, template, partial(self._on_tokens, first))
            except FootplateError as error:
                self.failures.append(f"{template.kind}: {type(error).__name__}: {error}")
            else:
                self.num_streams += 1
                if template.needs_seed:
                    self._without_seed.append((number % len(self._templates), got))
                else:
                    expected = self._expected[number % len(self._templates)]
                    self._compare(template.kind, expected, got)
            finally:
                self.num_asked -= template.width
                self._running.discard(first)
                self._silent.discard(first)
            number += stride
            if self._rest:
                await asyncio.sleep(self._rest * (time.monotonic() - since))

    def _on_tokens(self, worker: int, count: int) -> None:
        self.num_tokens += count
        self._silent.discard(worker)
        now = time.monotonic()
        self._longest_gap_s = max(self._longest_gap_s, now - self._last_token)
        self._last_token = now
        self._token_came.set()

    def _compare(self, kind: str, expected: Answer, got: Answer) -> None:
        if self.damage.add(expected, got):
            self.differences.append(f"{kind}: expected {expected}, got {got}")


async def _ask_all(
    engine: AsyncLLMEngine, templates: Sequence[Template], width: int
) -> list[Answer]:
    room = asyncio.Semaphore(width)

    async def one(template: Template) -> Answer:
        async with room:
            return await ask(engine, template, lambda count: None)

    return list(await asyncio.gather(*map(one, templates)))
