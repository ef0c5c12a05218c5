"""What a request asks for: `SamplingParams`, as the user writes it, and `TokenParams`, the half
of it that the engine core acts upon.

Text is the client's business (stop strings, detokenizing, output kinds), tokens are the core's.
"""

import math
import sys
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from footplate.protocol.errors import InvalidParameterError

MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_SEED = 2**63 - 1
MAX_FLOAT = sys.float_info.max


class RequestOutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = 0  # all text and token ids so far
    DELTA = 1  # what is new since the output before
    FINAL_ONLY = 2  # one output, when the request has finished


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How logits become tokens, tokens become text, and when a request ends.

    Names, defaults and meanings are vLLM's. Bounds are checked when it is built.

    Attributes:
        temperature: 0 is greedy decoding; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least
            this (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        top_k: keep the k most likely tokens; 0 and -1 keep all.
        min_p: drop tokens less likely than this fraction of the most likely one
            (Nguyen et al. 2024, "Min-p Sampling").
        seed: the noise of output position i depends on (seed, i) alone. When it is None the
            client draws one for the request.
        max_tokens: most tokens to produce; None produces until the context window is full.
        min_tokens: end-of-sequence and stop tokens cannot be chosen before this many, and stop
            strings are not looked for.
        stop: strings that end the request as soon as one is complete in the output text.
        stop_token_ids: tokens that end the request, beside the model's end-of-sequence tokens.
        ignore_eos: go on after an end-of-sequence token.
        include_stop_str_in_output: keep the stop string that ended the request in the text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put a space between adjacent special tokens in the text.
        detokenize: False yields token ids only, and `text` stays empty.
        output_kind: see `RequestOutputKind`.

    Raises:
        InvalidParameterError: a value is out of its bounds.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, math.inf)
        _require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_int("top_k", self.top_k, -1, 2**31 - 1)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                "min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})"
            )
        self._check_stops()
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidParameterError("output_kind", self.output_kind, "a RequestOutputKind")

    def _check_stops(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), str | list | tuple | None):
                raise InvalidParameterError(name, getattr(self, name), "a list, or None")
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidParameterError("stop", self.stop, f"at most {MAX_STOP_STRINGS} strings")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
                raise InvalidParameterError(
                    "stop", stop, f"a string of 1 to {MAX_STOP_STRING_CHARS} characters"
                )
        if stops and not self.detokenize:
            raise InvalidParameterError("stop", self.stop, "empty when detokenize is False")
        token_ids = self.stop_token_ids or ()
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameterError(
                "stop_token_ids", token_ids, f"at most {MAX_STOP_TOKEN_IDS} ids"
            )
        for token_id in token_ids:
            _require_int("stop_token_ids", token_id, 0, 2**31 - 1)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, also when one string was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TokenParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The engine core's half of `SamplingParams`, with everything resolved.

    Bounds are part of the types: decoding checks them, constructing does not.

    Attributes:
        seed: always explicit, so that a request can be run again.
        max_tokens: counts output tokens; never more than the context window leaves.
        stop_token_ids: the request's own and, unless it ignores them, the model's
            end-of-sequence tokens.
    """

    temperature: Annotated[float, Meta(ge=0)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    top_k: Annotated[int, Meta(ge=0)]
    min_p: Annotated[float, Meta(ge=0, le=1)]
    seed: Annotated[int, Meta(ge=0)]
    max_tokens: Annotated[int, Meta(ge=1)]
    min_tokens: Annotated[int, Meta(ge=0)]
    stop_token_ids: tuple[Annotated[int, Meta(ge=0)], ...]

    @classmethod
    def resolve(
        cls, params: SamplingParams, *, seed: int, max_tokens: int, eos_token_ids: tuple[int, ...]
    ) -> "TokenParams":
        """Fill in what the user left open."""
        own = tuple(params.stop_token_ids or ())
        return cls(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            stop_token_ids=own if params.ignore_eos else tuple({*own, *eos_token_ids}),
        )


def _require_int(name: str, value: object, low: int, high: int) -> None:
    # bool is an int to Python; as a count it is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameterError(name, value, f"an integer from {low} to {high}")


def _require_number(
    name: str, value: object, low: float, high: float, *, above: bool = False
) -> None:
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    # NaN fails every comparison. Infinity, and integers beyond all floats, fail the last one.
    if bad or not (low <= value <= high) or (above and value == low) or not abs(value) <= MAX_FLOAT:  # type: ignore[operator,arg-type]
        bounds = f"above {low:g}" if above else f"at least {low:g}"
        bounds += "" if math.isinf(high) else f" and at most {high:g}"
        raise InvalidParameterError(name, value, f"a finite number {bounds}")
