"""The engine core's half of what a request asks for: tokens, no text, and nothing left open.

Bounds are part of the types: decoding checks them, constructing does not. What is asked for rarely
stands in a group of its own, so that a plain request pays one byte and one comparison for it.
"""

from enum import IntEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from footplate.protocol.bounds import (
    MAX_BAD_WORDS,
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_REPETITION_PATTERN,
)

TokenId = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
TokenIds = tuple[TokenId, ...]


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of the optional groups. Fields are only ever appended, with a default."""


class ThinkingBudget(Group, frozen=True):
    """After `num_tokens` tokens between `start_ids` and `end_ids`, `end_ids` are forced."""

    num_tokens: Count
    start_ids: Annotated[TokenIds, Meta(min_length=1)]
    end_ids: Annotated[TokenIds, Meta(min_length=1)]


class ProcessorCall(Group, frozen=True):
    """A custom logits processor for this request.

    Attributes:
        index: into the processors that the engine was started with (`RequestConfig`).
        arguments: what its constructor is given; JSON's types.
    """

    index: Count
    arguments: dict[str, Any]


class LogitAdjustments(Group, frozen=True):
    """What is done to a row of logits before a token is chosen from it.

    Attributes:
        presence_penalty: subtracted from the logits of tokens that are in the output.
        frequency_penalty: subtracted once for each time that a token is in the output.
        repetition_penalty: logits of tokens in prompt or output are divided by it where positive,
            multiplied where not (Keskar et al. 2019, "CTRL", section 4.1).
        logit_bias: added, by token id.
        allowed_token_ids: all others are impossible; None allows all.
        bad_words: sequences whose last token is impossible where the others stand before it.
        forced_token_ids: output position i is token i of these, whatever the logits say.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=MAX_LOGIT_BIAS_ENTRIES)] = {}
    allowed_token_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    # Each word in two forms: with a space before it and without.
    bad_words: Annotated[
        tuple[Annotated[TokenIds, Meta(min_length=1)], ...], Meta(max_length=2 * MAX_BAD_WORDS)
    ] = ()
    thinking: ThinkingBudget | None = None
    forced_token_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    processors: tuple[ProcessorCall, ...] = ()


class LogprobsMode(IntEnum):
    """Which numbers are returned as logprobs.

    Raw: of the model's own logits. Processed: after everything that is done to them, temperature
    and top_k, top_p and min_p too (tokens that cannot be chosen have -inf).
    """

    RAW_LOGPROBS = 0
    PROCESSED_LOGPROBS = 1
    RAW_LOGITS = 2
    PROCESSED_LOGITS = 3


class LogprobsRequest(Group, frozen=True):
    """Logprobs of output and prompt. A count of 0 asks for the token itself only, -1 for the whole
    vocabulary, None for nothing.

    Attributes:
        num_logprobs: most likely tokens beside the sampled one.
        token_ids: further tokens to score at every output position.
        num_prompt_logprobs: the same for the tokens of the prompt, given those before them.
        prompt_token_ids: further tokens to score at every prompt position.
        prompt_start: no prompt position before this one is scored. Position 0 never is.
    """

    num_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    token_ids: Annotated[TokenIds, Meta(max_length=MAX_LOGPROB_TOKEN_IDS)] = ()
    num_prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    prompt_token_ids: Annotated[TokenIds, Meta(max_length=MAX_LOGPROB_TOKEN_IDS)] = ()
    prompt_start: Count = 0
    mode: LogprobsMode = LogprobsMode.RAW_LOGPROBS


class Grammar(Group, frozen=True):
    """What the output must match, in a grammar engine's own language.

    The client translates schemas, expressions and choices, so the core compiles one language.
    """

    text: Annotated[str, Meta(max_length=2 * MAX_GRAMMAR_BYTES)]
    language: str = "llguidance"


class RepetitionDetection(Group, frozen=True):
    """The request ends when the last `min_pattern_size` to `max_pattern_size` tokens have been
    said `min_count` times in a row."""

    max_pattern_size: Annotated[int, Meta(ge=1, le=MAX_REPETITION_PATTERN)]
    min_pattern_size: Annotated[int, Meta(ge=1)]
    min_count: Annotated[int, Meta(ge=2)]


class TokenParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the core acts upon.

    Attributes:
        seed: always explicit, so that a request can be run again.
        max_tokens: counts output tokens; never more than the context window leaves.
        stop_token_ids: the request's own and, unless it ignores them, the model's
            end-of-sequence tokens.
        skip_reading_prefix_cache: compute the whole prompt, and leave it in the cache for others.
    """

    temperature: Annotated[float, Meta(ge=0)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    top_k: Annotated[int, Meta(ge=0)]
    min_p: Annotated[float, Meta(ge=0, le=1)]
    seed: Annotated[int, Meta(ge=0)]
    max_tokens: Annotated[int, Meta(ge=1)]
    min_tokens: Count
    stop_token_ids: TokenIds
    adjustments: LogitAdjustments | None = None
    logprobs: LogprobsRequest | None = None
    grammar: Grammar | None = None
    repetition: RepetitionDetection | None = None
    skip_reading_prefix_cache: bool = False
