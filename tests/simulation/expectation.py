"""What the consumer of one request must get, whatever happens to cores and connections."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from footplate.frontend.logprobs import Logprobs
from footplate.frontend.outputs import CompletionOutput, RequestOutput
from footplate.frontend.recovery import BLAME
from footplate.frontend.stream import RequestStream
from footplate.frontend.text.detokenizer import PieceDetokenizer
from footplate.frontend.text.pieces import PieceTable, TokenBytes
from footplate.protocol.errors import EngineDeadError, FootplateError, QueueOverflowError
from footplate.protocol.messages import AddRequest, FinishReason, ModelFacts
from footplate.protocol.params import RequestOutputKind, SamplingParams

from .core_host import BAD_GRAMMAR, POISON
from .marks import Marks
from .oracle import expected_stream, row_of, single_requests

# Half of the tokens are parts of characters, some of them broken for ever.
PIECES = [
    *(b"a", b"b", b"c", b"ab", b" ", b"\xc3", b"\xa4", b"\xe2\x82", b"\xac", b"\xe2", b"\x82\xac"),
    *(b"\xf0\x9f", b"\x98\x80", b"\xff", b"bc", b"ca", b"\xc3\xa4", b"a\xe2", b"\xacb", b"\xf0"),
    *(b"\x9f\x98", b"\x80", b"cc", b"aa", b"", b"d", b"e", b"f", b"g", b"h"),
]


class BytePieces(PieceTable):
    """A vocabulary of such pieces."""

    def __init__(self) -> None:
        dict.__init__(self, enumerate(PIECES))
        self.token_bytes = TokenBytes(inside=str.encode, first=str.encode)

    def first(self, token_id: int) -> bytes:
        """See `PieceTable`."""
        return self[token_id]


TABLE = BytePieces()


def make_detokenizer() -> PieceDetokenizer:
    """For one completion."""
    return PieceDetokenizer(TABLE)


def text_of(token_ids: list[int]) -> str:
    """All of it, by the definition."""
    return b"".join(PIECES[token_id] for token_id in token_ids).decode(errors="replace")


def cut_at_stop(token_ids: list[int], params: SamplingParams) -> tuple[int, str, str | None]:
    """How many tokens there are up to the first one that completes a stop string, the text, and
    that stop string."""
    stops, detokenizer, text = params.stop_strings, make_detokenizer(), ""
    for count, token_id in enumerate(token_ids if stops else (), start=1):
        start = len(text)
        text += detokenizer.feed((token_id,))
        if count <= params.min_tokens:
            continue
        for end in range(start + 1, len(text) + 1):
            complete = [stop for stop in stops if text[:end].endswith(stop)]
            if complete:
                stop = max(complete, key=len)
                shown = end if params.include_stop_str_in_output else end - len(stop)
                return count, text[:shown], stop
    return len(token_ids), text_of(token_ids), None


@dataclass(slots=True, eq=False)
class ExpectedCompletion:
    """One completion, and how much of it the consumer has read."""

    prompt: list[int]
    token_ids: list[int]
    reason: FinishReason
    text: str
    stop: int | str | None
    is_scored: bool
    is_delta: bool
    read_ids: list[int] = field(default_factory=list)
    read_text: str = ""
    finish_reason: str | None = None
    ended_at: float = inf

    def read(self, output: CompletionOutput, now: float) -> None:
        """The next output of it: the right tokens, no more."""
        assert self.finish_reason is None, "an output behind the end"
        start = len(self.read_ids) if self.is_delta else 0
        if self.is_delta:
            self.read_ids += output.token_ids
            self.read_text += output.text
        else:
            assert output.text.startswith(self.read_text), "text was taken back"
            assert output.token_ids[: len(self.read_ids)] == self.read_ids, "a token was taken back"
            self.read_ids, self.read_text = output.token_ids, output.text
        assert self.read_ids == self.token_ids[: len(self.read_ids)], "a wrong token, or too many"
        self._check_logprobs(output.logprobs, start)
        if output.finish_reason is not None:
            self.finish_reason, self.ended_at = output.finish_reason, now
            self._check_end(output)

    def _check_logprobs(self, logprobs: Logprobs | None, start: int) -> None:
        assert (logprobs is not None) == self.is_scored
        if logprobs is not None:
            end = len(self.read_ids)
            tokens, num_prompt = [*self.prompt, *self.read_ids], len(self.prompt)
            expected = [scores(tokens, num_prompt + index) for index in range(start, end)]
            got = [{i: (e.rank, e.logprob) for i, e in (row or {}).items()} for row in logprobs]
            assert got == expected, "wrong logprobs"

    def _check_end(self, output: CompletionOutput) -> None:
        if output.finish_reason in ("abort", "deadline", "error"):
            # Whether it may be, the request says.
            assert self.read_text == text_of(self.read_ids), "a wrong text"
            return
        assert output.finish_reason == str(self.reason), "a wrong reason"
        assert self.read_ids == self.token_ids, "it ended early"
        assert self.read_text == self.text, "a wrong text"
        assert output.stop_reason == self.stop


def scores(token_ids: list[int], position: int) -> dict[int, tuple[int, float]]:
    """What is said of one token: rank and logprob, by token id."""
    rank, _, logprobs = row_of(token_ids, position)
    return {token_ids[position]: (rank, array("f", logprobs)[0])}


class ExpectedRequest:
    """Owns what is known of one request from outside, and reads its stream to the end.

    Attributes:
        was_aborted: by its user.
        num_sent: how often it went over the wire.
        arrival: when it was made, in seconds.
        has_ended: its consumer has been told.
    """

    def __init__(
        self,
        stream: RequestStream,
        message: AddRequest,
        session: bytes,
        model: ModelFacts,
        marks: Marks,
        clock: Callable[[], float],
    ) -> None:
        self.stream = stream
        self.message = message
        self.was_aborted = False
        self.num_sent = 0
        self.has_ended = False
        self.error: FootplateError | None = None
        self.arrival = clock()
        self._sent_at: dict[bytes, float] = {}  # by connection, of what has arrived
        self._clock = clock
        params = stream.params
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._told_prompt = False
        self.completions = []
        for single in single_requests(message):
            token_ids, reason, _ = expected_stream(single, model, session, marks)
            count, text, stop = cut_at_stop(token_ids, params)
            stop_reason: int | str | None = stop
            if stop is not None:
                token_ids, reason = token_ids[:count], FinishReason.STOP
            elif reason is FinishReason.STOP and token_ids:
                last = token_ids[-1]
                stop_reason = last if last in (params.stop_token_ids or ()) else None
            self.completions.append(
                ExpectedCompletion(
                    message.prompt_token_ids,
                    token_ids,
                    reason,
                    text,
                    stop_reason,
                    params.logprobs is not None,
                    self._is_delta,
                )
            )

    @property
    def is_poison(self) -> bool:
        """Whether no core survives it."""
        return self.message.cache_salt == POISON

    def check_sent(self, message: AddRequest, routing_id: bytes, sent_at: float) -> None:
        """What goes over the wire in its name is what its user asked for, and as old as it is."""
        own = self.message
        same = (message.priority, message.cache_salt, message.deadline_s, message.prompt_token_ids)
        assert same == (own.priority, own.cache_salt, own.deadline_s, own.prompt_token_ids)
        assert abs(message.age_s - (sent_at - self.arrival)) < 1e-6, "its clock was set"
        prior, first = message.prior_token_ids, message.handle - own.handle
        for completion in self.completions[first : first + message.n]:
            assert completion.token_ids[: len(prior)] == prior, "a wrong beginning"
            assert len(prior) >= len(completion.read_ids) - 1, "what is known is computed again"
            assert sent_at <= completion.ended_at, "sent again behind its end"
        self.num_sent += 1
        self._sent_at[routing_id] = sent_at

    def check_arrival(self, routing_id: bytes, arrival: float) -> None:
        """A core that runs it takes it to be as old as it is, less the time under way."""
        under_way_s = self._clock() - self._sent_at[routing_id]
        assert arrival < self.arrival + under_way_s + 1e-6, "its clock was set"

    def passes_deadline(self, has_token: bool) -> bool:
        """Whether its time is up."""
        age_s, message = self._clock() - self.arrival, self.message
        return any(
            seconds is not None and seconds <= age_s
            for seconds in (message.deadline_s, None if has_token else message.ttft_deadline_s)
        )

    def read(self) -> None:
        """Take all that is there."""
        while not self.has_ended:
            stream = self.stream
            if not stream.is_finished and (
                stream.is_final_only or not any(c.is_due for c in stream.completions)
            ):
                return
            try:
                stream.__anext__().send(None)
            except StopIteration as output:
                self._read(output.value)
            except StopAsyncIteration:
                self._end(None)
            except FootplateError as error:
                self._end(error)

    def _read(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            expected = self.completions[completion.index]
            expected.read(completion, self._clock())
            if completion.finish_reason == "deadline":
                assert self.passes_deadline(bool(expected.read_ids)), "a deadline before its time"
        wants_prompt = self.stream.params.prompt_logprobs is not None
        if wants_prompt and not (self._is_delta and self._told_prompt):
            self._check_prompt(output)
        self._told_prompt = True

    def _check_prompt(self, output: RequestOutput) -> None:
        prompt, start = self.message.prompt_token_ids, self.stream.params.prompt_logprob_start
        rows = output.prompt_logprobs
        assert rows is not None and len(rows) == len(prompt)
        has_token = any(completion.read_ids for completion in self.completions)
        for position, row in enumerate(rows):
            if row is not None:
                got = {i: (entry.rank, entry.logprob) for i, entry in row.items()}
                assert got == scores(prompt, position), "wrong logprobs of the prompt"
            else:
                is_missing = has_token and position >= max(1, start)
                assert not is_missing, "logprobs of the prompt are missing"

    def _end(self, error: FootplateError | None) -> None:
        assert self.stream.is_finished
        self.has_ended = True
        self.error = error
        if error is None:
            reasons = {completion.finish_reason for completion in self.completions}
            assert None not in reasons, "the end of a completion is missing"
            assert "error" not in reasons, "an error is missing"
            assert self.was_aborted or "abort" not in reasons, "aborted by nobody"
            if self.is_poison:
                assert self.was_aborted or reasons == {"deadline"}, "no core can have served it"
            return
        if not self.stream.is_final_only:
            for completion, own in zip(self.completions, self.stream.completions, strict=True):
                assert completion.read_ids == own.copy_token_ids(), "an error came before a token"
        if not isinstance(error, EngineDeadError) and BLAME not in str(error):
            self._check_error(error)

    def _check_error(self, error: FootplateError) -> None:
        """It is one that was to be expected, behind all the tokens there are before it."""
        if isinstance(error, QueueOverflowError):
            assert self.num_sent == 1, "refused when it had been taken in"
            assert not any(completion.read_ids for completion in self.completions)
        elif "as the test has it" in str(error):
            assert self.message.params.grammar == BAD_GRAMMAR
        else:
            assert "as marked" in str(error), f"a request failed: {error}"
            assert any(
                c.finish_reason == "error"
                and c.reason is FinishReason.ERROR
                and c.read_ids == c.token_ids
                for c in self.completions
            ), "an error too early"
