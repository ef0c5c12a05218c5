"""The way of one row from the model's logits to a token and its logprobs, around the draw itself.

edits = rows.edit(request, row)      # in place
result.token_ids[index] = ...        # drawn from the row, by whoever has the fastest way to
rows.settle(edits, index, result)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.adjustments import AdjustedRequest
from footplate.backend.logits.errors import RowFailed
from footplate.backend.logits.grammar_masks import GrammarMasks
from footplate.backend.logits.logprobs import RAW_MODES, Normaliser, log_sum_exp, score_rows
from footplate.backend.logits.processed import process_row
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.wanted import output_logprobs
from footplate.backend.request import Request
from footplate.backend.step import RowError, ScoredRows, StepResult
from footplate.protocol.messages import ErrorKind

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

NO_DISTRIBUTION = RowError(
    ErrorKind.LOGITS,
    "the logits are no distribution: they hold a NaN or infinity, or no token is possible",
    is_corrupted=True,
)


@dataclass(slots=True)
class EditedRow:
    """A row between its edit and its token.

    Attributes:
        request: whose it is.
        vocab_size: how long it is.
        scored: what logprobs will be made of; None where none are asked for.
        narrow: the only tokens that the grammar allows, ascending, where the row has not been
            restricted to them: the token is to be drawn among their logits. None everywhere else.
        failure: why the request cannot go on, if it cannot.
        is_complete: the grammar allows nothing behind the output that is there: no token is wanted.
    """

    request: Request
    vocab_size: int
    scored: FloatRow | None = None
    narrow: Ids | None = None
    failure: RowFailed | None = None
    is_complete: bool = False


class LogitRows:
    """Owns what is remembered of requests between steps, by `Request.key`: see `AdjustedRequest`
    and `GrammarMasks`.

    Args:
        processors: custom ones, as `LogitAdjustments.processors` numbers them.
        normalise: see `score_rows`.
    """

    def __init__(
        self,
        processors: Sequence[type[LogitsProcessor]] = (),
        normalise: Normaliser = log_sum_exp,
    ) -> None:
        self._processors = processors
        self._normalise = normalise
        self._adjusted: dict[int, AdjustedRequest] = {}
        self._grammars = GrammarMasks()

    def __len__(self) -> int:
        """Entries that wait to be forgotten."""
        return len(self._adjusted) + len(self._grammars)

    def prepare(self, requests: Iterable[Request], vocab_size: int) -> None:
        """Begin to make grammar masks, beside the forward pass that is to come.

        Args:
            requests: of the rows that will be edited next; all of them have a grammar.
            vocab_size: length of a row.
        """
        self._grammars.prepare(requests, vocab_size)

    def prepare_ahead(self, requests: Iterable[Request], vocab_size: int) -> None:
        """As `prepare`, behind the tokens that were just settled."""
        self._grammars.prepare_ahead(requests, vocab_size)

    def forget(self, keys: Iterable[int]) -> None:
        """Drop what is held for these requests, if anything is."""
        for key in keys:
            self._adjusted.pop(key, None)
            self._grammars.forget(key)

    def edit(self, request: Request, row: FloatRow, *, may_narrow: bool = False) -> EditedRow:
        """Do to a row what its request asks for, in place, and put aside what is needed later.

        Args:
            row: float32 [vocab], of the request's next token.
            may_narrow: whether the caller looks at `EditedRow.narrow`. To write and to read a whole
                row costs more than all else, where a grammar leaves a few tokens.
        """
        edited = EditedRow(request, len(row))
        wanted = output_logprobs(request)
        if wanted is not None and wanted.mode in RAW_MODES:
            edited.scored = row.copy()
        try:
            if _forced_token(request) is not None and not np.isfinite(row.max()):
                # Nobody is going to draw from this row, and notice.
                raise RowFailed(ErrorKind.LOGITS, NO_DISTRIBUTION.message, is_corrupted=True)
            self._adjust(edited, row, may_narrow and (wanted is None or edited.scored is not None))
        except RowFailed as failure:
            edited.failure = failure
        if wanted is not None and edited.scored is None:
            edited.scored = row.copy()
        return edited

    def _adjust(self, edited: EditedRow, row: FloatRow, may_narrow: bool) -> None:
        request = edited.request
        params = request.params
        if (
            params.adjustments is None
            and request.grammar is None
            and request.num_output_tokens >= params.min_tokens
        ):
            return
        grammar = None
        if request.grammar is not None:
            grammar = self._grammars.allowed(request, len(row))
            if grammar is None:
                edited.is_complete = True
                return
        adjusted = self._adjusted.get(request.key)
        # No longer than before: a step is run again. A processor of somebody else's may remember
        # that it was called.
        if (
            adjusted is None
            or adjusted.request is not request
            or adjusted.num_tokens >= len(request.token_ids)
        ):
            adjusted = AdjustedRequest(request, len(row), self._processors)
            self._adjusted[request.key] = adjusted
        adjusted.adjust(row, grammar)
        if grammar is not None:
            edited.narrow = grammar.narrow if may_narrow else None
            if edited.narrow is None:
                grammar.restrict(row)
        # A grammar alone allows something, and reading all of a row again would cost 5 us.
        if params.adjustments is not None and _forced_token(request) is None:
            possible = row if edited.narrow is None else row[edited.narrow]
            if possible.max() == -np.inf:
                raise RowFailed(
                    ErrorKind.LOGITS, f"no token is possible, with {adjusted.name_changes()}"
                )

    def _no_distribution(self, request: Request) -> RowError:
        adjusted = self._adjusted.get(request.key)
        if adjusted is None:
            return NO_DISTRIBUTION
        message = f"{NO_DISTRIBUTION.message}; the request has {adjusted.name_changes()}"
        return RowError(ErrorKind.LOGITS, message, is_corrupted=True)

    def settle(self, edited: EditedRow, index: int, result: StepResult) -> None:
        """Complete a step's result in one place: a forced token, the grammar, logprobs, an error.

        Args:
            index: into `result.token_ids`, where the drawn token stands; -1 where the row was no
                distribution.
        """
        request = edited.request
        try:
            if edited.failure is not None:
                raise edited.failure
            if edited.is_complete:
                result.already_complete.add(index)
                return
            forced = _forced_token(request)
            if forced is not None:
                if forced >= edited.vocab_size:
                    raise RowFailed(
                        ErrorKind.INVALID,
                        f"forced token {forced}: ids are 0 to {edited.vocab_size - 1}",
                    )
                result.token_ids[index] = forced
            token_id = result.token_ids[index]
            if token_id < 0:
                result.errors[index] = self._no_distribution(request)
                return
            if request.grammar is not None and self._grammars.advance(request, token_id):
                result.complete.add(index)
        except RowFailed as failure:
            result.errors[index] = failure.error
            return
        if edited.scored is not None:
            result.logprobs[index] = self._score(
                edited.scored, request, token_id, is_drawn=forced is None
            )

    def _score(
        self, row: FloatRow, request: Request, token_id: int, *, is_drawn: bool
    ) -> ScoredRows:
        wanted = request.params.logprobs
        assert wanted is not None
        if wanted.mode not in RAW_MODES:
            row = process_row(row, request.params, token_id if is_drawn else None)
        return score_rows(
            [row],
            [token_id],
            request.num_output_tokens,
            wanted.num_logprobs or 0,
            wanted.token_ids,
            wanted.mode,
            self._normalise,
        )

    def score_prompt(
        self, rows: Iterable[FloatRow], request: Request, positions: range
    ) -> ScoredRows:
        """Score tokens of a prompt. They were not drawn, so whatever the mode, the numbers are
        those of the model itself: logits where the mode gives logits, and logprobs otherwise.

        Args:
            rows: float32 [vocab] each, of the tokens before `positions`.
            positions: as from `prompt_positions`.
        """
        wanted = request.params.logprobs
        assert wanted is not None
        return score_rows(
            rows,
            request.token_ids[positions.start : positions.stop],
            positions.start,
            wanted.num_prompt_logprobs or 0,
            wanted.prompt_token_ids,
            wanted.mode,
            self._normalise,
        )


def _forced_token(request: Request) -> int | None:
    adjustments = request.params.adjustments
    forced = adjustments.forced_token_ids if adjustments is not None else None
    position = request.num_output_tokens
    return forced[position] if forced is not None and position < len(forced) else None
