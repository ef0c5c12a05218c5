"""What a beam search is asked for, as the user writes it: `BeamSearchParams`."""

import math
from typing import Literal

import msgspec

from footplate.protocol.bounds import MAX_INT, require_bool, require_int, require_number
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.structured import StructuredOutputsParams

MAX_BEAM_WIDTH = 64  # requests in flight at once, for one call
# Powers of an output's length, of millions of tokens even, stay within float32.
MAX_LENGTH_PENALTY = 5.0

EarlyStopping = bool | Literal["never"]


class BeamSearchParams(msgspec.Struct, kw_only=True, frozen=True):
    """How wide to search, how far, and which outputs are best.

    Names and defaults are vLLM's, as far as it has them; the search is transformers'. Where they
    differ transformers is followed: length means the tokens of the output, its end-of-sequence
    token included (vLLM counts the prompt too, and leaves that token out), every end-of-sequence
    token of the model ends a beam (in vLLM only the tokenizer's), and the search ends as
    `early_stopping` has it (in vLLM at `max_tokens` only).

    Attributes:
        beam_width: beams that are followed, and outputs that are returned. 1 is greedy search.
        max_tokens: most tokens of an output.
        ignore_eos: end-of-sequence tokens are tokens like all others.
        temperature: logits are divided by it; 0 leaves them as they are, as 1 does.
        length_penalty: outputs are compared by the sum of their log probabilities, divided by
            their length to this power: above 0 favours long outputs, below 0 short ones.
        early_stopping: when the search ends, once there are `beam_width` outputs. True: at once.
            False: when no beam, at the length it has, is better than the worst of them. "never":
            when none can become better than it, at any length up to `max_tokens`.
        include_stop_str_in_output: the text ends with that of the end-of-sequence token. The token
            ids do in either case.
        detokenize: False yields token ids only, and `text` stays empty.
        structured_outputs: what every output must look like. Log probabilities are then those
            among the tokens that are allowed. There are fewer outputs than `beam_width` where it
            allows no more.

    Raises:
        InvalidParameterError: a value is out of its bounds.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        require_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        require_int("max_tokens", self.max_tokens, 1, MAX_INT)
        require_number("temperature", self.temperature, 0.0, math.inf)
        require_number(
            "length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY
        )
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize"):
            require_bool(name, getattr(self, name))
        # By type, then by value: 1 is equal to True.
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidParameterError(
                "early_stopping", self.early_stopping, "True, False or 'never'"
            )
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidParameterError(
                "structured_outputs", self.structured_outputs, "StructuredOutputsParams, or None"
            )
