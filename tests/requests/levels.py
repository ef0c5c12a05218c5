"""Everything that one request can ask for, with the values of each parameter that are put together.

Token ids are below 384: those of the demo tokenizer's special tokens (0 to 5), of all bytes, and of
its first merges. What makes tokens impossible leaves all single bytes, so that whatever a grammar
asks for can be said. (Where a grammar leaves only one text, llguidance allows only the tokens that
the tokenizer would write it in: so the texts in these grammars are such that no merge applies.)
"""

import json
import re
from reprlib import repr as shortened
from typing import Any

from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from footplate.protocol.bounds import MAX_BAD_WORDS

from .pairwise import Row

BYTES = range(6, 262)
MERGES = range(262, 384)
LETTERS = range(70, 96)  # a to z
OPEN, CLOSE = 13, 14  # "(" and ")", which begin and end thinking
PROCESSOR = "position_bias:PositionBias"
LONG_TEXT = "of the list that is in the function, and in the list of the test: (a) is it"
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 6},
        "b": {"enum": [1, 22, 77]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
VOCABULARY = json.loads((DEMO_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
WORDS = [text for text, i in VOCABULARY.items() if i >= MERGES.start and re.match("[a-z]+$", text)]
CHOICES = ["e~1", "e~22", "zq(7)"]

# The first level of each parameter is what a request has that does not care.
PARAMS: dict[str, list[Any]] = {
    "n": [1, 3],
    "presence_penalty": [0.0, 1.5, -2.0],
    "frequency_penalty": [0.0, 0.7, -1.0],
    "repetition_penalty": [1.0, 1.3, 0.7],
    "temperature": [1.0, 0.0, 0.7, 1.5],
    "top_p": [1.0, 0.7],
    "top_k": [0, 1, 5],
    "min_p": [0.0, 0.2],
    "seed": [7, 2**63 - 2, None],
    "max_tokens": [16, 8, None],
    "min_tokens": [0, 4, 9],
    "stop": [None, ["e", "th", "e th", "i"], ["t", "1", " ", "o"]],
    "stop_token_ids": [None, list(MERGES[::2])],
    "bad_words": [None, [*WORDS[: MAX_BAD_WORDS - 1], "e e"]],
    "logit_bias": [
        None,
        {**dict.fromkeys(LETTERS, 1e9), 70: -1e9},
        {i: i * 7 % 11 - 5.0 for i in range(0, 384, 3)},
    ],
    "allowed_token_ids": [None, list(BYTES)],
    "ignore_eos": [False, True],
    "logprobs": [None, 0, 3, -1],
    "prompt_logprobs": [None, 0, 2, -1],
    "logprob_token_ids": [None, [300, 40, 300]],
    "prompt_logprob_token_ids": [None, [301]],
    "prompt_logprob_start": [0, 3, 500],
    "logprobs_mode": [None, "raw_logprobs", "raw_logits", "processed_logits"],
    "flat_logprobs": [False, True],
    "structured_outputs": [
        None,
        StructuredOutputsParams(regex=r"[a-z )]{2,12}(é[0-9]+)?"),
        StructuredOutputsParams(json=SCHEMA),
        StructuredOutputsParams(choice=CHOICES),
    ],
    "thinking_token_budget": [None, 0, 3],
    "repetition_detection": [None, RepetitionDetectionParams(max_pattern_size=2)],
    "skip_reading_prefix_cache": [False, True],
    "trace_decode_token_ids": [None, [40, 4, 262, 301, 0, 200, 41, 262]],
    "logits_processors": [None, {"PositionBias": {"period": 5, "amount": 4.0}}],
    "include_stop_str_in_output": [False, True],
    "skip_special_tokens": [True, False],
    "spaces_between_special_tokens": [True, False],
    "detokenize": [True, False],
    "output_kind": list(RequestOutputKind),
    "stream_interval": [None, 3],
}

# Of `generate`. Deadlines are far away; an arrival is that many seconds ago.
ARGUMENTS: dict[str, list[Any]] = {
    "prompt": [
        "The function(",
        {"prompt_token_ids": [0, 60, 61, OPEN]},
        LONG_TEXT,
    ],
    "priority": [0, -1, 5],
    "ttft_deadline_s": [None, 3600.0],
    "deadline_s": [None, 3600.0],
    "arrival_time": [None, 1.0],
}

LEVELS = PARAMS | ARGUMENTS

# What must not make a difference to an answer; and a decoder that adds no spaces has none to leave
# out.
WITHOUT_EFFECT = {
    "skip_reading_prefix_cache",
    "priority",
    "ttft_deadline_s",
    "deadline_s",
    "arrival_time",
    "spaces_between_special_tokens",
}

NOT_WITH_A_TRACE = {
    "n",
    "stop",
    "structured_outputs",
    "repetition_detection",
    "thinking_token_budget",
    "bad_words",
}


def is_legal(row: Row) -> bool:
    """Whether the levels of a row, or of part of one, go together."""
    changed = {name for name, level in row.items() if level}
    if "trace_decode_token_ids" in changed and changed & NOT_WITH_A_TRACE:
        return False
    if {"stop", "detokenize"} <= changed:
        return False
    # Of those that are left out the default is meant.
    most = PARAMS["max_tokens"][row.get("max_tokens", 0)]
    return most is None or PARAMS["min_tokens"][row.get("min_tokens", 0)] <= most


def describe(row: Row) -> str:
    """The values that a row stands for, of those that are no default: for people."""
    changed = ((name, LEVELS[name][level]) for name, level in row.items() if level)
    return ", ".join(f"{name}={shortened(value)}" for name, value in changed)


def params_of(row: Row) -> SamplingParams:
    """The row as a request. Refused where `is_legal` should have said so."""
    return SamplingParams(**{name: PARAMS[name][row.get(name, 0)] for name in PARAMS})
