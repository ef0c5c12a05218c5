"""Logits for the fake model, for requests that ask for more than its next token. Needs numpy, and
is imported when the first of them comes."""

import sys
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.rows import LogitRows
from footplate.backend.request import Request
from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.step import ScoredRows, StepResult
from footplate.protocol.token_params import TokenParams

FloatRow = npt.NDArray[np.float32]

TOP_LOGIT = 8.0  # of the next token
OTHER_LOGITS = 4.0  # those of other tokens are below it, and not negative
LOW_LOGIT = -8.0  # of special tokens


def pseudo_logits(
    digest: int, likeliest: int, params: TokenParams, vocab_size: int, first_id: int
) -> FloatRow:
    """The logits behind a prefix of this digest, float32 [vocab_size]: a pure function of the
    prefix, and of the seed unless the request is greedy.

    Args:
        likeliest: the token with the largest of them.
        first_id: ids below it are special tokens.
    """
    if params.temperature > 0:
        digest = crc32(params.seed.to_bytes(8, "little"), digest)
    bits = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0x9E3779B1) ^ np.uint32(digest)
    bits = (bits ^ bits >> np.uint32(15)) * np.uint32(0x85EBCA6B)
    # 24 bits are what a float32 holds.
    row = (bits >> np.uint32(8)).astype(np.float32) * np.float32(OTHER_LOGITS / 2**24)
    row[:first_id] = LOW_LOGIT
    row[likeliest] = TOP_LOGIT
    return row


class FakeRows:
    """The way from such rows to tokens and logprobs: that of real models, with the largest logit
    for a draw."""

    def __init__(
        self, processors: Sequence[type[LogitsProcessor]], vocab_size: int, first_id: int
    ) -> None:
        self._rows = LogitRows(processors)
        self._vocab_size = vocab_size
        self._first_id = first_id

    def __len__(self) -> int:
        """Entries that wait to be forgotten."""
        return len(self._rows)

    def forget(self, keys: Iterable[int]) -> None:
        """Drop what is held for requests of these keys, if anything is."""
        self._rows.forget(keys)

    def choose(self, request: Request, digest: int, index: int, result: StepResult) -> None:
        """Put a request's next token, and all that belongs to it, into a step's result.

        Args:
            digest: of all of its tokens.
            index: into `result.token_ids`, where `next_token` stands.
        """
        likeliest, params = result.token_ids[index], request.params
        row = pseudo_logits(digest, likeliest, params, self._vocab_size, self._first_id)
        edited = self._rows.edit(request, row)
        token_id = int(row.argmax())
        result.token_ids[index] = token_id if np.isfinite(row[token_id]) else -1
        self._rows.settle(edited, index, result)

    def score_prompt(self, request: Request, positions: range) -> ScoredRows:
        """See `LogitRows.score_prompt`."""
        params = request.params
        digest = digest_prefix(request.token_ids[: positions.start - 1])
        rows = []
        for token_id in request.token_ids[positions.start - 1 : positions.stop - 1]:
            digest = digest_prefix([token_id], digest)
            # No position in the output: min_tokens is not for prompts.
            likeliest = next_token(digest, sys.maxsize, params, self._vocab_size, self._first_id)
            rows.append(pseudo_logits(digest, likeliest, params, self._vocab_size, self._first_id))
        return self._rows.score_prompt(rows, request, positions)
