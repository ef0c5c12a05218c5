"""What a request asks for, as the user writes it: `SamplingParams`.

Text is the client's business (stop strings, detokenizing, output kinds), tokens are the core's:
what it is told stands in `token_params`.
"""

import math
from collections.abc import Callable
from enum import Enum
from itertools import compress
from operator import is_not
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
_Check = Callable[[str, object], None]
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


# No work for the garbage collector: nothing that its fields may hold can lead back to it.
class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, gc=False):
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
            strings that are complete by then do not count.
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
        # Only what differs from its default is looked at: one comparison in C per parameter.
        changed = map(is_not, msgspec.structs.astuple(self), _DEFAULTS)
        for name in compress(self.__struct_fields__, changed):
            _CHECKS[name](name, getattr(self, name))
        if self.min_tokens and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})"
            )
        if self.stop and not self.detokenize:
            raise InvalidParameterError("stop", self.stop, "empty when detokenize is False")
        if self.trace_decode_token_ids is not None:
            for name in _NOT_WITH_A_TRACE:
                if getattr(self, name) not in (None, 1, "", [], ()):
                    raise InvalidParameterError(
                        name,
                        getattr(self, name),
                        "left alone where trace_decode_token_ids is given",
                    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, also when one string was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# A trace says what every token is, and where the output ends.
_NOT_WITH_A_TRACE = (
    "n",
    "stop",
    "structured_outputs",
    "repetition_detection",
    "thinking_token_budget",
    "bad_words",
)


def _check_stop(name: str, stop: object) -> None:
    if not isinstance(stop, str | list | tuple | None):
        raise InvalidParameterError(name, stop, "a string, a list, or None")
    strings = (stop,) if isinstance(stop, str) else stop or ()
    require_few(name, strings, MAX_STOP_STRINGS, "strings")
    for string in strings:
        _require_text(name, string, MAX_STOP_STRING_CHARS)


def _check_bad_words(name: str, words: object) -> None:
    if words is None:
        return
    require_list(name, words, MAX_BAD_WORDS, "strings")
    for word in words:  # type: ignore[attr-defined]
        _require_text(name, word, MAX_BAD_WORD_CHARS)


def _check_logit_bias(name: str, bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise InvalidParameterError(name, bias, "a dictionary, or None")
    require_few(name, bias, MAX_LOGIT_BIAS_ENTRIES, "entries")
    for token_id, value in bias.items():
        require_int(name, token_id, 0, MAX_INT)
        require_number(name, value, -math.inf, math.inf)


def _check_logits_processors(name: str, processors: object) -> None:
    if processors is None:
        return
    if not isinstance(processors, dict) or not all(
        isinstance(key, str) and isinstance(arguments, dict)
        for key, arguments in processors.items()
    ):
        raise InvalidParameterError(name, processors, "a dictionary of argument dictionaries")
    try:
        size = len(msgspec.json.encode(processors))
        msgspec.msgpack.encode(processors)  # as it will travel: integers have 64 bits there
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidParameterError(name, processors, f"of JSON's types: {error}") from None
    if size > MAX_PROCESSOR_ARGUMENT_BYTES:
        raise InvalidParameterError(
            name, f"<{size} bytes>", f"at most {MAX_PROCESSOR_ARGUMENT_BYTES} bytes of JSON"
        )


def _require_text(name: str, value: object, most: int) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise InvalidParameterError(name, value, f"a string of 1 to {most} characters")


def _an_int(low: int, high: int = MAX_INT, *, optional: bool = False) -> _Check:
    def check(name: str, value: object) -> None:
        if value is not None or not optional:
            require_int(name, value, low, high)

    return check


def _a_number(low: float, high: float = math.inf, *, above: bool = False) -> _Check:
    return lambda name, value: require_number(name, value, low, high, above=above)


def _token_ids(most: int, *, at_least_one: bool = False) -> _Check:
    def check(name: str, value: object) -> None:
        require_token_ids(name, value, most)
        if at_least_one and value is not None and not value:
            raise InvalidParameterError(name, value, "None, or at least one id")

    return check


def _one_of(choices: tuple[object, ...]) -> _Check:
    def check(name: str, value: object) -> None:
        # Not by `in` alone: an array compares with everything, and answers with an array.
        if not isinstance(value, str | None) or value not in choices:
            raise InvalidParameterError(name, value, f"one of {choices}")

    return check


def _instance(kind: type, *, optional: bool = True) -> _Check:
    def check(name: str, value: object) -> None:
        if not isinstance(value, kind) and not (optional and value is None):
            wanted = f"{kind.__name__}, or None" if optional else f"a {kind.__name__}"
            raise InvalidParameterError(name, value, wanted)

    return check


_CHECKS: dict[str, _Check] = {
    "n": _an_int(1, MAX_N),
    "presence_penalty": _a_number(-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _a_number(-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": _a_number(0.0, above=True),
    "temperature": _a_number(0.0),
    "top_p": _a_number(0.0, 1.0, above=True),
    "top_k": _an_int(-1),
    "min_p": _a_number(0.0, 1.0),
    "seed": _an_int(0, MAX_SEED, optional=True),
    "max_tokens": _an_int(1, optional=True),
    "min_tokens": _an_int(0),
    "stop": _check_stop,
    "stop_token_ids": _token_ids(MAX_STOP_TOKEN_IDS),
    "bad_words": _check_bad_words,
    "logit_bias": _check_logit_bias,
    "allowed_token_ids": _token_ids(MAX_ALLOWED_TOKEN_IDS, at_least_one=True),
    "ignore_eos": require_bool,
    "logprobs": _an_int(-1, optional=True),
    "prompt_logprobs": _an_int(-1, optional=True),
    "logprob_token_ids": _token_ids(MAX_LOGPROB_TOKEN_IDS),
    "prompt_logprob_token_ids": _token_ids(MAX_LOGPROB_TOKEN_IDS),
    "prompt_logprob_start": _an_int(0),
    "logprobs_mode": _one_of((None, *LOGPROBS_MODES)),
    "flat_logprobs": require_bool,
    "structured_outputs": _instance(StructuredOutputsParams),
    "thinking_token_budget": _an_int(0, optional=True),
    "repetition_detection": _instance(RepetitionDetectionParams),
    "skip_reading_prefix_cache": require_bool,
    "trace_decode_token_ids": _token_ids(MAX_INT, at_least_one=True),
    "logits_processors": _check_logits_processors,
    "include_stop_str_in_output": require_bool,
    "skip_special_tokens": require_bool,
    "spaces_between_special_tokens": require_bool,
    "detokenize": require_bool,
    "output_kind": _instance(RequestOutputKind, optional=False),
    "stream_interval": _an_int(1, optional=True),
}
_DEFAULTS = tuple(field.default for field in msgspec.structs.fields(SamplingParams))
assert tuple(_CHECKS) == SamplingParams.__struct_fields__
