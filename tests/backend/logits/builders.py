"""Requests about to get their next token, and a grammar that a test can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.rows import LogitRows
from footplate.backend.request import Request
from footplate.backend.step import StepResult
from footplate.backend.structured.interface import GrammarError
from footplate.protocol.token_params import LogitAdjustments, LogprobsRequest, TokenParams

FloatRow = npt.NDArray[np.float32]
PLAIN: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 0,
    "max_tokens": 1000,
    "min_tokens": 0,
    "stop_token_ids": (),
}
ADJUSTMENTS = set(LogitAdjustments.__struct_fields__)


def make_params(logprobs: LogprobsRequest | None = None, **fields: Any) -> TokenParams:
    """Fields of `TokenParams` and of `LogitAdjustments`, by their names."""
    own = {name: value for name, value in fields.items() if name in ADJUSTMENTS}
    others = {name: value for name, value in fields.items() if name not in ADJUSTMENTS}
    adjustments = LogitAdjustments(**own) if own else None
    return TokenParams(**(PLAIN | others), adjustments=adjustments, logprobs=logprobs)


def make_request(
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    *,
    key: int = 1,
    grammar: Any = None,
    params: TokenParams | None = None,
    **fields: Any,
) -> Request:
    return Request(
        key=key,
        client=b"",
        handle=key,
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        params=params or make_params(**fields),
        grammar=grammar,
    )


def run(
    rows: LogitRows, request: Request, logits: Sequence[float] | FloatRow
) -> tuple[FloatRow, StepResult]:
    """One step of one greedy request: the edited row, and what became of it."""
    row = np.array(logits, np.float32)
    edited = rows.edit(request, row)
    token_id = int(row.argmax())
    result = StepResult([token_id if np.isfinite(row[token_id]) else -1])
    rows.settle(edited, 0, result)
    return row, result


def edited_row(
    logits: Sequence[float],
    request: Request,
    processors: Sequence[type[LogitsProcessor]] = (),
) -> list[float]:
    row, result = run(LogitRows(processors), request, logits)
    assert not result.errors, result.errors
    return list(map(float, row))


class SetGrammar:
    """Output position i is one of the i-th set; behind the last set there is nothing.

    Counts the matchers that were started, and how many tokens each has taken.
    """

    def __init__(self, *allowed: set[int], vocab_size: int = 8) -> None:
        self.allowed = allowed
        self.vocab_size = vocab_size
        self.matchers: list[SetMatcher] = []

    def start(self) -> "SetMatcher":
        self.matchers.append(SetMatcher(self))
        return self.matchers[-1]


class SetMatcher:
    def __init__(self, grammar: SetGrammar) -> None:
        self._grammar = grammar
        self.taken: list[int] = []
        self.num_masks = 0

    def advance(self, token_ids: Sequence[int]) -> bool:
        for token_id in token_ids:
            if token_id not in self._grammar.allowed[len(self.taken)]:
                raise GrammarError(f"token {token_id} is not allowed at {len(self.taken)}")
            self.taken.append(token_id)
        return len(self.taken) == len(self._grammar.allowed)

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        self.num_masks += 1
        assert mask.shape == ((self._grammar.vocab_size + 31) // 32,)
        mask[:] = 0
        for token_id in self._grammar.allowed[len(self.taken)]:
            mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
