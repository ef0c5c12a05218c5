"""Beam search over tokens and their log probabilities. Knows no engine, no text and no clock.

The search is that of transformers (`generate(num_beams=...)`, version 5), in float32 as there, so
that its results and their order are the same. A step extends every beam by its best next tokens
and looks at all of these together: of the best `beam_width`, those that end become outputs; the
best `beam_width` that do not end are the beams of the next step.

Places that transformers fills with scores of -1e9 are empty here. That differs only for outputs
that score less, which negative length penalties make of very unlikely ones: transformers drops
them.
"""

from array import array
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import NamedTuple, Self

from footplate.frontend.beam_params import BeamSearchParams, EarlyStopping
from footplate.protocol.messages import FinishReason

_NOT_ALLOWED = float("-inf")
_END = -1  # in the place of a token: there is none, the beam ends


class NextTokens(NamedTuple):
    """What may follow one beam.

    Attributes:
        token_ids: at least `BeamSearch.num_candidates` of the most likely ones, or all that there
            are.
        logprobs: theirs. -inf is no candidate.
        is_complete: the beam is an output as it stands, and nothing may follow. That counts as
            the end-of-sequence token would that a mask of transformers leaves there, with a
            probability of 1 and in the length.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    is_complete: bool = False


class BeamOutput(NamedTuple):
    """An output that the search has found.

    Attributes:
        token_ids: of the output alone, with the end-of-sequence token that ended it.
        cumulative_logprob: sum of its tokens' log probabilities, in float32.
        score: what outputs are compared by; see `beam_score`.
        finish_reason: STOP or LENGTH.
        has_eos: the last token is an end-of-sequence token, and ended it.
    """

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason
    has_eos: bool


class BeamSearch:
    """One search from its prompt to its outputs.

    Owns the beams and the outputs so far. Until `is_finished`, the caller finds out what may
    follow each of `beams` and calls `advance`.

    Equal scores, which are rare, stand in the order of their beams, then of their token ids; in
    transformers their order is an accident.

    Args:
        eos_token_ids: tokens that end a beam.
        length_penalty: see `BeamSearchParams`, as for the others.
    """

    def __init__(
        self,
        beam_width: int,
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self._beam_width = beam_width
        self._max_tokens = max_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._length_penalty = length_penalty
        # transformers calls one beam greedy search, which ends where its only output does.
        self._early_stopping = early_stopping if beam_width > 1 else True
        self._num_tokens = 0  # of every beam
        self._beams = [_Beam([], 0.0)]  # best first
        self._outputs: list[BeamOutput] = []
        self._is_finished = False

    @classmethod
    def of(cls, params: BeamSearchParams, eos_token_ids: Collection[int]) -> Self:
        """A search with a user's parameters, on a model with these end-of-sequence tokens."""
        return cls(
            params.beam_width,
            params.max_tokens,
            () if params.ignore_eos else eos_token_ids,
            params.length_penalty,
            params.early_stopping,
        )

    @property
    def num_candidates(self) -> int:
        """How many next tokens of each beam may matter; transformers looks at more, in vain.

        Those that end matter among the best `beam_width`. Of those that do not end the best
        `beam_width` matter, and all that can stand between them are tokens that end.
        """
        return self._beam_width + len(self._eos_token_ids)

    @property
    def beams(self) -> list[list[int]]:
        """Output token ids of the beams that go on, best first. To be read only."""
        return [beam.token_ids for beam in self._beams]

    @property
    def is_finished(self) -> bool:
        """Whether the outputs are final."""
        return self._is_finished

    @property
    def outputs(self) -> list[BeamOutput]:
        """Outputs so far, best first: in the end `beam_width`, or as many as there can be."""
        return self._outputs

    def advance(self, next_tokens: Sequence[NextTokens]) -> None:
        """Make one step.

        Args:
            next_tokens: what may follow each of `beams`, in their order.
        """
        assert not self._is_finished
        candidates = self._candidates(next_tokens)
        self._num_tokens += 1
        ending: list[BeamOutput] = []
        going_on: list[_Beam] = []
        for rank, (loss, number, token_id) in enumerate(candidates):
            if self._ends(token_id):
                # Those further down are there only so that enough beams go on.
                if rank < self._beam_width:
                    ending.append(self._output(self._beams[number], token_id, -loss))
            elif len(going_on) < self._beam_width:
                going_on.append(_Beam([*self._beams[number].token_ids, token_id], -loss))
            else:
                break  # the best `beam_width` have been looked at, too
        self._beams = going_on
        # Stable: of equal ones, those that were found first.
        best_first = sorted(self._outputs + ending, key=attrgetter("score"), reverse=True)
        self._outputs = best_first[: self._beam_width]
        self._is_finished = self._is_over()

    def _candidates(self, next_tokens: Sequence[NextTokens]) -> list[tuple[float, int, int]]:
        """All of them, best first: the sum of log probabilities with its sign changed, the number
        of the beam, the token id."""
        candidates = []
        for number, (beam, following) in enumerate(zip(self._beams, next_tokens, strict=True)):
            if following.is_complete:
                # Its end costs nothing, and competes with the other beams' next tokens.
                candidates.append((-beam.score, number, _END))
                continue
            # An array of floats rounds as float32 arithmetic does.
            scores = array("f", [beam.score + logprob for logprob in following.logprobs])
            candidates += [
                (-score, number, token_id)
                for token_id, score in zip(following.token_ids, scores, strict=True)
                if score != _NOT_ALLOWED
            ]
        candidates.sort()
        return candidates

    def _ends(self, token_id: int) -> bool:
        return (
            token_id == _END
            or token_id in self._eos_token_ids
            or self._num_tokens == self._max_tokens
        )

    def _output(self, beam: "_Beam", token_id: int, logprob: float) -> BeamOutput:
        token_ids = beam.token_ids if token_id == _END else [*beam.token_ids, token_id]
        has_eos = token_id in self._eos_token_ids
        return BeamOutput(
            token_ids,
            logprob,
            beam_score(logprob, self._num_tokens, self._length_penalty),
            FinishReason.STOP if has_eos or token_id == _END else FinishReason.LENGTH,
            has_eos,
        )

    def _is_over(self) -> bool:
        if not self._beams:
            return True
        if len(self._outputs) < self._beam_width:
            return False
        if self._early_stopping is True:
            return True
        length = self._num_tokens
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_tokens
        best_possible = beam_score(self._beams[0].score, length, self._length_penalty)
        return not best_possible > self._outputs[-1].score


class _Beam(NamedTuple):
    token_ids: list[int]
    score: float  # sum of their log probabilities, float32


def beam_score(cumulative_logprob: float, num_tokens: int, length_penalty: float) -> float:
    """What outputs are compared by: their sum of log probabilities by a power of their length.

    Args:
        num_tokens: of the output alone, with its end: an end-of-sequence token, or that of its
            grammar. At least 1.

    Returns:
        In float32, as transformers' `sequences_scores`.
    """
    return _float32(cumulative_logprob / _float32(float(num_tokens) ** length_penalty))


def _float32(value: float) -> float:
    return array("f", (value,))[0]
