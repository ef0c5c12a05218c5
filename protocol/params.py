"""What a request asks for, as the user writes it: `SamplingParams`.

Text is the client's business (stop strings, detokenizing, output kinds), tokens are the core's:
what it is told stands in `token_params`.
"""

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

import msgspec

from footplate.protocol.bounds import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_INT,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_N,
    MAX_PENALTY,
    MAX_PROCESSOR_ARGUMENT_BYTES,
    MAX_REPETITION_PATTERN,
    MAX_SEED,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    require_bool,
    require_few,
    require_int,
    require_list,
    require_number,
    require_token_ids,
)
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.structured import StructuredOutputsParams

LogprobsModeName = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


class RequestOutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = 0  # all text and token ids so far
    DELTA = 1  # what is new since the output before
    FINAL_ONLY = 2  # one output, when the request has finished


class RepetitionDetectionParams(msgspec.Struct, kw_only=True, frozen=True):
    """When a request that goes round in circles ends, with finish reason `repetition`.

    Attributes:
        max_pattern_size: longest pattern to look for, in tokens.
        min_pattern_size: shortest one.
        min_count: how often in a row a pattern must stand at the end of the output.

    Raises:
        InvalidParameterError: a value is out of its bounds.
    """

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        name = "repetition_detection."
        require_int(f"{name}max_pattern_size", self.max_pattern_size, 1, MAX_REPETITION_PATTERN)
        require_int(f"{name}min_pattern_size", self.min_pattern_size, 1, self.max_pattern_size)
        require_int(f"{name}min_count", self.min_count, 2, MAX_INT)


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How logits become tokens, tokens become text, and when a request ends.

    Names, defaults and meanings are vLLM's. Bounds are checked when it is built; what depends on
    the model (its vocabulary, its length, the engine's limits) when the request is made.
    `docs/requests.md` has an example of each.

    Attributes:
        n: completions of the prompt. Completion i is what a request with seed + i would give.
        presence_penalty: subtracted from the logits of tokens that the output has already.
        frequency_penalty: subtracted once for each time that the output has the token.
        repetition_penalty: logits of tokens in prompt or output are divided by it if positive and
            multiplied if not (Keskar et al. 2019, "CTRL", section 4.1).
        temperature: 0 is greedy decoding; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least
            this (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        top_k: keep the k most likely tokens; 0 and -1 keep all.
        min_p: drop tokens less likely than this fraction of the most likely one
            (Nguyen et al. 2024, "Min-p Sampling").
        seed: the noise of output position i depends on (seed, i) alone. When it is None the
            client draws one for the request, and returns it with every output.
        max_tokens: most tokens to produce; None produces until the context window is full.
        min_tokens: end-of-sequence and stop tokens cannot be chosen before this many, and stop
            strings are not looked for.
        stop: strings that end the request as soon as one is complete in the output text.
        stop_token_ids: tokens that end the request, beside the model's end-of-sequence tokens.
        bad_words: strings that the output does not contain, at the start of a word or inside
            the text: the last token of each one's token ids is impossible behind the others.
        logit_bias: added to the logits of these token ids, clamped to -100 to 100.
        allowed_token_ids: all other tokens are impossible.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: log probabilities of the chosen token and of this many most likely ones, at each
            output position; -1 gives the whole vocabulary. None gives none.
        prompt_logprobs: the same for the tokens of the prompt, from the second one on. Prefixes
            are then not read from the cache.
        logprob_token_ids: score these tokens too at each output position.
        prompt_logprob_token_ids: score these tokens too at each prompt position.
        prompt_logprob_start: first prompt position to be scored.
        logprobs_mode: of what the numbers are; see `footplate.protocol.token_params.LogprobsMode`.
            None takes the engine's.
        flat_logprobs: logprobs as arrays (`FlatLogprobs`) rather than a dictionary per token.
        structured_outputs: what the output must look like; see `StructuredOutputsParams`.
        thinking_token_budget: most tokens between the model's begin and end of thinking; then its
            end is forced.
        repetition_detection: ends outputs that go round in circles.
        skip_reading_prefix_cache: compute the whole prompt.
        trace_decode_token_ids: the output is forced to be these tokens, and logprobs are what the
            model would have given them. Takes the place of `max_tokens`; nothing else ends it.
        logits_processors: processors that the engine was started with, by name, and the arguments
            of each for this request.
        include_stop_str_in_output: keep the stop string that ended the request in the text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put a space between adjacent special tokens in the text.
        detokenize: False yields token ids only, and `text` stays empty.
        output_kind: see `RequestOutputKind`.
        stream_interval: tokens from one output to the next; the first and the last always have
            one of their own. None takes the engine's.

    Raises:
        InvalidParameterError: a value is out of its bounds.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    bad_words: list[str] | tuple[str, ...] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | tuple[int, ...] | None = None
    prompt_logprob_token_ids: list[int] | tuple[int, ...] | None = None
    prompt_logprob_start: int = 0
    logprobs_mode: LogprobsModeName | None = None
    flat_logprobs: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    skip_reading_prefix_cache: bool = False
    trace_decode_token_ids: list[int] | tuple[int, ...] | None = None
    logits_processors: dict[str, dict[str, Any]] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_flags()
        self._check_stops()
        self._check_tokens()
        self._check_logprobs()
        self._check_groups()
        if self.trace_decode_token_ids is not None:
            self._check_trace()

    def _check_numbers(self) -> None:
        require_int("n", self.n, 1, MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            require_number(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        require_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        require_number("temperature", self.temperature, 0.0, math.inf)
        require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        require_int("top_k", self.top_k, -1, MAX_INT)
        require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            require_int("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            require_int("max_tokens", self.max_tokens, 1, MAX_INT)
        require_int("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})"
            )
        if self.thinking_token_budget is not None:
            require_int("thinking_token_budget", self.thinking_token_budget, 0, MAX_INT)
        if self.stream_interval is not None:
            require_int("stream_interval", self.stream_interval, 1, MAX_INT)

    def _check_flags(self) -> None:
        for name in _FLAGS:
            require_bool(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidParameterError("output_kind", self.output_kind, "a RequestOutputKind")

    def _check_stops(self) -> None:
        if not isinstance(self.stop, str | list | tuple | None):
            raise InvalidParameterError("stop", self.stop, "a list, or None")
        stops = self.stop_strings
        require_few("stop", stops, MAX_STOP_STRINGS, "strings")
        for stop in stops:
            _require_text("stop", stop, MAX_STOP_STRING_CHARS)
        if stops and not self.detokenize:
            raise InvalidParameterError("stop", self.stop, "empty when detokenize is False")
        require_token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)

    def _check_tokens(self) -> None:
        if self.bad_words is not None:
            require_list("bad_words", self.bad_words, MAX_BAD_WORDS, "strings")
            for word in self.bad_words:
                _require_text("bad_words", word, MAX_BAD_WORD_CHARS)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidParameterError("logit_bias", self.logit_bias, "a dictionary, or None")
            require_few("logit_bias", self.logit_bias, MAX_LOGIT_BIAS_ENTRIES, "entries")
            for token_id, bias in self.logit_bias.items():
                require_int("logit_bias", token_id, 0, MAX_INT)
                require_number("logit_bias", bias, -math.inf, math.inf)
        require_token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParameterError(
                "allowed_token_ids", self.allowed_token_ids, "None, or at least one id"
            )

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), -1, MAX_INT)
        for name in ("logprob_token_ids", "prompt_logprob_token_ids"):
            require_token_ids(name, getattr(self, name), MAX_LOGPROB_TOKEN_IDS)
        require_int("prompt_logprob_start", self.prompt_logprob_start, 0, MAX_INT)
        if self.logprobs_mode is not None and self.logprobs_mode not in LOGPROBS_MODES:
            raise InvalidParameterError(
                "logprobs_mode", self.logprobs_mode, f"one of {LOGPROBS_MODES}"
            )

    def _check_groups(self) -> None:
        for name, kind in _GROUPS.items():
            if not isinstance(getattr(self, name), kind | None):
                raise InvalidParameterError(name, getattr(self, name), f"{kind.__name__}, or None")
        if self.logits_processors is None:
            return
        if not isinstance(self.logits_processors, dict) or not all(
            isinstance(name, str) and isinstance(arguments, dict)
            for name, arguments in self.logits_processors.items()
        ):
            raise InvalidParameterError(
                "logits_processors", self.logits_processors, "a dictionary of argument dictionaries"
            )
        try:
            size = len(msgspec.json.encode(self.logits_processors))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidParameterError(
                "logits_processors", self.logits_processors, f"of JSON's types: {error}"
            ) from None
        if size > MAX_PROCESSOR_ARGUMENT_BYTES:
            raise InvalidParameterError(
                "logits_processors",
                f"<{size} bytes>",
                f"at most {MAX_PROCESSOR_ARGUMENT_BYTES} bytes of JSON",
            )

    def _check_trace(self) -> None:
        require_token_ids("trace_decode_token_ids", self.trace_decode_token_ids, MAX_INT)
        if not self.trace_decode_token_ids:
            raise InvalidParameterError(
                "trace_decode_token_ids", self.trace_decode_token_ids, "None, or at least one id"
            )
        for name in _NOT_WITH_A_TRACE:
            if getattr(self, name) not in (None, 1):
                raise InvalidParameterError(
                    name, getattr(self, name), "left alone where trace_decode_token_ids is given"
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, also when one string was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_FLAGS = (
    "ignore_eos",
    "flat_logprobs",
    "skip_reading_prefix_cache",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "detokenize",
)
_GROUPS = {
    "structured_outputs": StructuredOutputsParams,
    "repetition_detection": RepetitionDetectionParams,
}
# A trace says what every token is, and where the output ends.
_NOT_WITH_A_TRACE = (
    "n",
    "stop",
    "structured_outputs",
    "repetition_detection",
    "thinking_token_budget",
    "bad_words",
)


def _require_text(name: str, value: object, most: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise InvalidParameterError(name, value, f"a string of 1 to {most} characters")
