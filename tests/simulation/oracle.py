"""What every client must be told, worked out without scheduler, blocks or batches."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.protocol.messages import (
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    LogprobRows,
    ModelFacts,
    Started,
)
from footplate.protocol.token_params import RepetitionDetection, TokenParams

from .marks import Marks


def single_requests(message: AddRequest) -> Iterator[AddRequest]:
    """The requests that this one is, each made alone."""
    for index in range(message.n):
        params = msgspec.structs.replace(message.params, seed=message.params.seed + index)
        yield msgspec.structs.replace(message, handle=message.handle + index, params=params, n=1)


def expected_stream(
    message: AddRequest, model: ModelFacts, client: bytes, marks: Marks
) -> tuple[list[int], FinishReason, ErrorKind]:
    """All that a valid request adds to its prior output, and how it ends if nobody ends it."""
    params, prompt, handle = message.params, message.prompt_token_ids, message.handle
    output = list(message.prior_token_ids)
    digest = digest_prefix([*prompt, *output])
    num_prior = len(output)

    def ends(reason: FinishReason) -> tuple[list[int], FinishReason, ErrorKind]:
        return output[num_prior:], reason, ErrorKind.INTERNAL

    if prior_ends_it(client, message, marks):
        return ends(FinishReason.STOP)
    while True:
        if kind := marks.error_at(client, handle, len(output)):
            return output[num_prior:], FinishReason.ERROR, kind
        is_complete = marks.is_complete_at(client, handle, len(output), params.grammar)
        token_id = chosen_token(digest, output, params, model.vocab_size)
        output.append(token_id)
        digest = digest_prefix([token_id], digest)
        if is_complete or (token_id in params.stop_token_ids and len(output) > params.min_tokens):
            return ends(FinishReason.STOP)
        if len(output) == params.max_tokens or len(prompt) + len(output) == model.max_model_len:
            return ends(FinishReason.LENGTH)
        if len(output) >= params.min_tokens and is_repetitive(output, params.repetition):
            return ends(FinishReason.REPETITION)


def chosen_token(digest: int, output: list[int], params: TokenParams, vocab_size: int) -> int:
    """The token behind `output`, at the end of a prefix of this digest.

    Penalties count the output, wherever it came from: here they choose by it once more.
    """
    if params.adjustments is not None:
        digest = digest_prefix(output, digest)
    return next_token(digest, len(output), params, vocab_size)


def prior_ends_it(client: bytes, message: AddRequest, marks: Marks) -> bool:
    """Whether it ends without a token, because its grammar allows none behind what there is."""
    num_prior, grammar = len(message.prior_token_ids), message.params.grammar
    return num_prior > 0 and marks.is_complete_before(client, message.handle, num_prior, grammar)


def is_repetitive(output: list[int], wanted: RepetitionDetection | None) -> bool:
    """By the definition."""
    return wanted is not None and any(
        len(output) >= size * wanted.min_count
        and output[-size * wanted.min_count :] == output[-size:] * wanted.min_count
        for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1)
    )


def is_valid(message: AddRequest, model: ModelFacts) -> bool:
    """Whether the core has to serve it, if its handles are free and there is room."""
    params, prompt, prior = message.params, message.prompt_token_ids, message.prior_token_ids
    times = (message.age_s, message.ttft_deadline_s or 0.0, message.deadline_s or 0.0)
    return (
        len(prompt) > 0
        and len(prompt) + len(prior) < model.max_model_len
        and all(0 <= token_id < model.vocab_size for token_id in [*prompt, *prior])
        and len(prior) < params.max_tokens
        and not any(token_id in params.stop_token_ids for token_id in prior[params.min_tokens :])
        and not (len(prior) >= params.min_tokens and is_repetitive(prior, params.repetition))
        and all(0 <= seconds < float("inf") for seconds in times)
    )


def row_of(token_ids: list[int], position: int) -> tuple[int, bytes, bytes]:
    """Rank, ids and logprobs by which the runner scores the token at `position`, behind those
    before it."""
    digest = digest_prefix(token_ids[:position])
    ids = array("i", [token_ids[position]]).tobytes()
    return digest % 1000, ids, array("f", [digest % 4093]).tobytes()


@dataclass(slots=True, eq=False)
class ExpectedFamily:
    """The requests of one message, by handle: the first that computes the prompt tells of it."""

    streams: list["ExpectedStream"] = field(default_factory=list)

    @property
    def teller(self) -> "ExpectedStream":
        """The first that has not ended without a token."""
        return next(s for s in self.streams if s.num_received or not s.is_over)


@dataclass(slots=True, eq=False)
class ExpectedStream:
    """One valid request of one client, and how much of it has been delivered."""

    message: AddRequest
    family: ExpectedFamily
    arrival: int
    arrival_time: float
    token_ids: list[int]
    reason: FinishReason
    kind: ErrorKind
    num_received: int = 0
    num_rows: int = 0
    next_scored: int = 0
    is_started: bool = False
    is_aborted: bool = False
    is_overdue: bool = False
    has_run: bool = False
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.next_scored = self._first_scored

    @property
    def _first_scored(self) -> int:
        wanted = self.message.params.logprobs
        num_prompt_tokens = len(self.message.prompt_token_ids)
        if wanted is None or wanted.num_prompt_logprobs is None:
            return num_prompt_tokens
        return min(max(1, wanted.prompt_start), num_prompt_tokens)

    @property
    def max_num_steps(self) -> int:
        """Steps it takes at one token per step, which is what the best ranked gets at least."""
        message = self.message
        return len(message.prompt_token_ids) + len(message.prior_token_ids) + len(self.token_ids)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or the next step will say so."""
        return self.has_ended or self.is_aborted or self.is_overdue

    @property
    def is_new(self) -> bool:
        """Whether it is queued and has not had its first step."""
        return not self.has_run and not self.is_over

    @property
    def may_come_late(self) -> bool:
        """Whether it may be queued when others that came after it run already."""
        return self.message.age_s > 0 or len(self.family.streams) > 1

    @property
    def waits(self) -> bool:
        """Whether it waits for its first step, and not for a sibling."""
        is_free = self.family.teller is self or self.family.teller.num_received > 0
        return self.is_new and is_free

    @property
    def has_deadline(self) -> bool:
        """Whether its time may run out."""
        return self.message.ttft_deadline_s is not None or self.message.deadline_s is not None

    def passes_deadline(self, now: float) -> bool:
        """Whether its time is up."""
        message = self.message
        has_token = self.num_received or message.prior_token_ids
        return any(
            seconds is not None and self.arrival_time + seconds <= now
            for seconds in (message.deadline_s, None if has_token else message.ttft_deadline_s)
        )

    def receive(self, position: int, token_id: int) -> None:
        """The next token, as a client sees it."""
        assert not self.is_aborted and not self.is_overdue, "a token behind the end"
        index = position - len(self.message.prior_token_ids)
        assert index == self.num_received, "a gap or a repetition"
        assert [token_id] == self.token_ids[index : index + 1], "a wrong token, or too many"
        if not self.num_received:
            is_told = self.next_scored == len(self.message.prompt_token_ids)
            if self.family.teller is self:
                assert is_told, "a token before the logprobs of the prompt"
        self.num_received += 1

    def score(self, rows: LogprobRows) -> None:
        """Logprobs of a token that has just come."""
        wanted, message = self.message.params.logprobs, self.message
        assert wanted is not None and wanted.num_logprobs is not None, "nobody asked"
        assert rows.position == len(message.prior_token_ids) + self.num_rows
        self.num_rows += 1
        assert self.num_rows == self.num_received
        tokens = [*message.prompt_token_ids, *message.prior_token_ids, *self.token_ids]
        assert (rows.ranks[0], rows.token_ids, rows.logprobs) == row_of(
            tokens, len(message.prompt_token_ids) + rows.position
        )

    def score_prompt(self, rows: LogprobRows) -> None:
        """Logprobs of its prompt: in order, each once, before the first token."""
        assert not self.num_received and self.family.teller is self, "told by a sibling"
        prompt = self.message.prompt_token_ids
        assert rows.position == self.next_scored
        self.next_scored += len(rows.ranks)
        assert self.next_scored <= len(prompt), "nobody asked"
        expected = [row_of(prompt, p) for p in range(rows.position, self.next_scored)]
        assert rows.ranks == [row[0] for row in expected]
        assert rows.token_ids == b"".join(row[1] for row in expected)
        assert rows.logprobs == b"".join(row[2] for row in expected)

    def finish(self, finished: Finished) -> None:
        """It comes once and is true."""
        self.has_ended = True
        assert self.is_started == (self.num_received > 0)
        if self.is_aborted:
            assert finished.reason is FinishReason.ABORT
        elif self.is_overdue:
            assert finished.reason is FinishReason.DEADLINE
        else:
            assert (finished.reason, finished.kind) == (self.reason, self.kind)
            assert self.num_received == len(self.token_ids), "it ended early"
            assert bool(finished.message) == (self.reason is FinishReason.ERROR)
            wanted = self.message.params.logprobs
            if wanted is not None and wanted.num_logprobs is not None:
                assert self.num_rows == self.num_received


@dataclass(slots=True)
class ExpectedClient:
    """What one client waits for, from join to leave."""

    block_size: int
    caching: bool
    num_handles: int = 0
    streams: dict[int, ExpectedStream] = field(default_factory=dict)
    refusals: dict[int, list[ErrorKind]] = field(default_factory=dict)  # by handle

    def start(self, started: Started) -> None:
        """It comes once, with the first token."""
        stream = self.streams[started.handle]
        assert not stream.is_started and stream.num_received == 1
        stream.is_started = True
        cached, message = started.num_cached_tokens, stream.message
        num_prompt_tokens = len(message.prompt_token_ids)
        num_readable = num_prompt_tokens + len(message.prior_token_ids) - 1
        assert 0 <= cached <= min(num_prompt_tokens, num_readable)
        assert cached % self.block_size == 0 or cached == num_prompt_tokens
        is_alone = len(stream.family.streams) == 1
        if is_alone and message.params.skip_reading_prefix_cache:
            assert not cached
        assert self.caching or not is_alone or not cached

    def finish(self, finished: Finished) -> None:
        """It comes once for every request, and is true."""
        handle = finished.handle
        if self.refusals.get(handle):  # before the handle was taken by another, if it was
            assert finished.reason is FinishReason.ERROR and finished.message
            assert finished.kind is self.refusals[handle].pop(0)
            return
        assert handle in self.streams, "a second end"
        self.streams.pop(handle).finish(finished)

    @property
    def is_satisfied(self) -> bool:
        """Whether everything has had its end."""
        return not self.streams and not any(self.refusals.values())
