"""What a request must answer, by definition, given the model's logits: plain Python over whole
outputs, and nothing of the engine's own code but the types of its messages.

What is done to a row of logits, and the draw, are in the reference of tests/backend/logits.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, pre_tokenizers

from footplate.frontend import SamplingParams, StructuredOutputsParams
from footplate.protocol.token_params import LogitAdjustments, ThinkingBudget, TokenParams
from tests.backend.logits.reference import Processor, log_softmax

from .levels import CLOSE, OPEN
from .position_bias import PositionBias

NO_TOKEN = "<no token of the model>"


@dataclass(frozen=True)
class Model:
    """What has to be known of a model.

    Args:
        tokenizer_folder: of a byte-level tokenizer.
    """

    tokenizer_folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int

    @property
    def is_fake(self) -> bool:
        """The fake model has no end of sequence, and takes the largest logit."""
        return not self.eos_token_ids

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the `tokenizers` package."""
        return Tokenizer.from_file(str(self.tokenizer_folder / "tokenizer.json"))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token."""
        # GPT-2's alphabet: printable bytes stand for themselves, the others from U+0100 on.
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in own]
        byte_of = {chr(byte): byte for byte in own}
        byte_of |= {chr(256 + number): byte for number, byte in enumerate(others)}
        assert byte_of.keys() == set(pre_tokenizers.ByteLevel.alphabet())
        texts = {token_id: text for text, token_id in self.tokenizer.get_vocab().items()}
        return [
            texts[token_id].encode()
            if token_id in self.special_ids
            else bytes(byte_of[c] for c in texts[token_id])
            for token_id in range(self.vocab_size)
        ]

    @cached_property
    def special_ids(self) -> set[int]:
        """Tokens that are no text of their own."""
        return {
            i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }

    @cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """The vocabulary for grammars; a model without an end of sequence gets one that it cannot
        say, because llguidance needs it."""
        if self.eos_token_ids:
            eos, size = list(self.eos_token_ids), self.vocab_size
            return LLTokenizer(self.tokenizer.to_str(), n_vocab=size, eos_token=eos)
        larger = Tokenizer.from_str(self.tokenizer.to_str())
        larger.add_special_tokens([NO_TOKEN])
        size = self.vocab_size
        return LLTokenizer(larger.to_str(), n_vocab=size + 1, eos_token=size)

    def text_of(self, token_id: int) -> str:
        """Of one token by itself."""
        return self.pieces[token_id].decode(errors="replace")


def token_params(params: SamplingParams, model: Model, max_tokens: int) -> TokenParams:
    """The numbers in a request, with its seed given."""
    stops = set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stops |= set(model.eos_token_ids)
    trace, budget = params.trace_decode_token_ids, params.thinking_token_budget
    bias = {i: min(max(x, -100.0), 100.0) for i, x in (params.logit_bias or {}).items()}
    words = [word.lstrip() for word in params.bad_words or ()]
    assert params.seed is not None
    return TokenParams(
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.seed,
        max_tokens,
        params.min_tokens,
        () if trace else tuple(stops),
        adjustments=LogitAdjustments(
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            bias,
            tuple(params.allowed_token_ids) if params.allowed_token_ids is not None else None,
            tuple(
                tuple(model.tokenizer.encode(form, add_special_tokens=False).ids)
                for word in words
                for form in (word, " " + word)
            ),
            ThinkingBudget(budget, (OPEN,), (CLOSE,)) if budget is not None else None,
            tuple(trace) if trace else None,
        ),
    )


def processors_of(params: SamplingParams, prompt: list[int], model: Model) -> list[Processor]:
    """A request's custom logits processors."""
    called = (params.logits_processors or {}).values()
    return [PositionBias(arguments, prompt, model.vocab_size) for arguments in called]


def most_tokens(params: SamplingParams, num_prompt_tokens: int, model: Model) -> int:
    """Where an output ends at the latest."""
    if params.trace_decode_token_ids:
        return len(params.trace_decode_token_ids)
    return params.max_tokens or model.max_model_len - num_prompt_tokens


class GrammarState:
    """Where an output stands in its grammar."""

    def __init__(self, wanted: StructuredOutputsParams, model: Model) -> None:
        if wanted.regex is not None:
            grammar = LLMatcher.grammar_from_regex(wanted.regex)
        elif wanted.json is not None:
            grammar = LLMatcher.grammar_from_json_schema(wanted.json)
        else:
            texts = map(json.dumps, wanted.choice or ())
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
        self._matcher = LLMatcher(model.grammar_tokenizer, grammar)
        self._model = model

    def allowed(self) -> set[int]:
        """Tokens of the model that may come next."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._model.vocab_size]
        allowed = set(np.flatnonzero(bits).tolist())
        # Some of this model's ends are text as well: inside of an output they are impossible.
        ends = set(self._model.eos_token_ids)
        return allowed | ends if self._matcher.is_accepting() else allowed - ends

    def take(self, token_id: int) -> bool:
        """Go on; whether nothing more may follow."""
        assert self._matcher.consume_token(token_id)
        if self._matcher.is_stopped():
            return True
        return self._model.is_fake and not self.allowed()


class End(NamedTuple):
    """The end of an output."""

    num_tokens: int
    finish_reason: str
    stop_reason: int | str | None
    text: str


def end_of(
    token_ids: Sequence[int], num_prompt_tokens: int, params: SamplingParams, model: Model
) -> End | None:
    """Where, why and with which text an output ends that begins with these tokens; None if it does
    not end here."""
    most = most_tokens(params, num_prompt_tokens, model)
    stops = token_params(params, model, most).stop_token_ids
    grammar = None
    if params.structured_outputs is not None:
        grammar = GrammarState(params.structured_outputs, model)
    reader = Reader(params, model)
    for number, token_id in enumerate(token_ids, 1):
        reader.add(token_id)
        is_complete = grammar is not None and grammar.take(token_id)
        is_stop = token_id in stops and number > params.min_tokens
        if reader.stop is not None:
            return End(number, "stop", reader.stop, reader.text)
        if is_stop or is_complete:
            own = is_stop and token_id in (params.stop_token_ids or ())
            return End(number, "stop", token_id if own else None, reader.whole_text)
        if number == most:
            return End(number, "length", None, reader.whole_text)
        if is_repeating(token_ids[:number], params) and number >= params.min_tokens:
            return End(number, "repetition", None, reader.whole_text)
    return None


def is_repeating(token_ids: Sequence[int], params: SamplingParams) -> bool:
    """Whether an output ends with a pattern that has been said often enough."""
    wanted = params.repetition_detection
    if wanted is None:
        return False
    for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1):
        end = list(token_ids[-size * wanted.min_count :])
        if len(end) == size * wanted.min_count and end == end[:size] * wanted.min_count:
            return True
    return False


class Reader:
    """The text of an output that grows, up to its first stop string."""

    def __init__(self, params: SamplingParams, model: Model) -> None:
        self._params, self._model = params, model
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_tokens = 0
        self._searched_from = 0  # stop strings are looked for behind min_tokens
        self.text = ""
        self.stop: str | None = None

    def add(self, token_id: int) -> None:
        """The next token."""
        params, text = self._params, self.text
        if not params.detokenize:
            return
        if not (params.skip_special_tokens and token_id in self._model.special_ids):
            self.text += self._decoder.decode(self._model.pieces[token_id])
        self._num_tokens += 1
        if self._num_tokens <= params.min_tokens:
            self._searched_from = len(self.text)
            return
        for end in range(len(text), len(self.text) + 1):
            found = [s for s in params.stop_strings if self._ends_with(s, end)]
            if found:
                self.stop = max(found, key=len)
                kept = len(self.stop) if params.include_stop_str_in_output else 0
                self.text = self.text[: end - len(self.stop) + kept]
                return

    def _ends_with(self, stop: str, end: int) -> bool:
        return self.text[self._searched_from : end].endswith(stop)

    @property
    def whole_text(self) -> str:
        """With what is left of a character that never became whole."""
        return self.text + self._decoder.decode(b"", final=True)


class Score(NamedTuple):
    """A token's number and its rank."""

    token_id: int
    number: float
    rank: int | None


def scores_of(
    row: list[float], token_id: int, count: int, further: Sequence[int], *, as_logits: bool
) -> list[Score]:
    """The entries of a position: the token, the most likely ones, and those asked for by id.

    Args:
        row: of logits, raw or processed.
        count: of most likely tokens; -1 is all.
    """
    numbers = row if as_logits else log_softmax(row)
    scores = {token_id: Score(token_id, numbers[token_id], 1 + sum(x > row[token_id] for x in row))}
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    for rank, other in enumerate(ranked if count < 0 else ranked[:count], 1):
        scores.setdefault(other, Score(other, numbers[other], rank))
    for other in further:
        scores.setdefault(other, Score(other, numbers[other], None))
    return list(scores.values())
