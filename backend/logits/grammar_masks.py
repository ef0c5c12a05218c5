"""Which tokens the grammars of requests allow next: masks that are begun when the token before is
known, and made while the model computes the logits that they are for."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from footplate.backend.cause import describe_cause
from footplate.backend.logits.errors import RowFailed
from footplate.backend.logits.token_set import Mask, TokenSet, TokenSets
from footplate.backend.request import Request
from footplate.backend.structured.interface import GrammarError, Matcher
from footplate.protocol.messages import ErrorKind


@dataclass(slots=True)
class _Match:
    """A request's matcher, and how much of the output it has taken."""

    request: Request
    matcher: Matcher | None = None  # the worker starts it
    num_taken: int = 0
    last_taken: int = -1
    # As long as it is there and not done, the worker has the matcher.
    job: "Future[None] | None" = None
    position: int = -1  # in the output, that `allowed` is for
    allowed: TokenSet | None = None  # None: the output is complete
    error: GrammarError | None = None


class GrammarMasks:
    """Owns one matcher per running request with a grammar, by `Request.key`, and a thread.

    A matcher only goes forward. Whenever it has taken other tokens than the output holds (a step
    is run again, a request begins anew), another one starts at the beginning.
    """

    def __init__(self) -> None:
        self._matches: dict[int, _Match] = {}
        # Filling a mask releases the GIL, so one thread does it beside the forward pass. More of
        # them would take cores from that.
        self._worker: ThreadPoolExecutor | None = None
        self._sets = TokenSets()  # the worker's

    def __len__(self) -> int:
        return len(self._matches)

    def prepare(self, requests: Iterable[Request], vocab_size: int) -> None:
        """Begin to make the masks of the next tokens of these requests."""
        due = []
        for request in requests:
            position = request.num_output_tokens
            if self._is_ahead(request, position):
                continue
            match = self._match_of(request)
            if match.position != position:
                match.position = position
                due.append(match)
        self._begin(due, vocab_size)

    def prepare_ahead(self, requests: Iterable[Request], vocab_size: int) -> None:
        """Begin to make the masks behind the tokens that were just taken. Between two forward
        passes a core is idle, and during one none is."""
        due = []
        for request in requests:
            match = self._matches.get(request.key)
            if match is not None and match.num_taken == request.num_output_tokens + 1:
                match.position = match.num_taken
                due.append(match)
        self._begin(due, vocab_size)

    def _is_ahead(self, request: Request, position: int) -> bool:
        """Whether the mask is being made already, for an output that has come about since."""
        match = self._matches.get(request.key)
        return (
            match is not None
            and match.job is not None
            and match.request is request
            and match.position == position == match.num_taken
            and match.last_taken == request.token_ids[-1]
        )

    def _begin(self, due: "list[_Match]", vocab_size: int) -> None:
        if due:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "grammar masks")
            # One job for all: handing over one for each costs as much as their masks.
            job = self._worker.submit(self._find_allowed, due, vocab_size)
            for match in due:
                match.job = job

    def _match_of(self, request: Request) -> _Match:
        match = self._matches.get(request.key)
        if match is not None:
            self._wait_for(match)
            length, start = match.num_taken, request.num_prompt_tokens
            if (
                match.request is request
                and length <= request.num_output_tokens
                and (not length or request.token_ids[start + length - 1] == match.last_taken)
            ):
                return match
        match = self._matches[request.key] = _Match(request)
        return match

    def _wait_for(self, match: _Match) -> None:
        """Have the matcher back from the worker, which may hold it when a step has failed."""
        if match.job is not None:
            match.job.result()
            match.job = None

    def allowed(self, request: Request, vocab_size: int) -> TokenSet | None:
        """Which tokens may come next; None where the output is complete, and the grammar allows
        nothing behind it.

        Raises:
            RowFailed: the output has left its grammar, the grammar's limits are exceeded, or it
                allows no token at all.
        """
        self.prepare([request], vocab_size)
        match = self._matches[request.key]
        self._wait_for(match)
        if match.error is not None:
            raise self._fail(request, match.error) from match.error
        return match.allowed

    def advance(self, request: Request, token_id: int) -> bool:
        """Take the token that was chosen; whether the grammar allows nothing more behind it.

        Raises:
            RowFailed: the grammar does not allow the token, or its limits are exceeded.
        """
        match = self._matches[request.key]
        self._wait_for(match)
        assert match.matcher is not None, "nothing is chosen without its mask"
        try:
            is_complete = match.matcher.advance([token_id])
        except Exception as error:
            raise self._fail(request, _as_grammar_error(error)) from error
        match.num_taken += 1
        match.last_taken = token_id
        return is_complete

    def _fail(self, request: Request, error: GrammarError) -> RowFailed:
        self.forget(request.key)  # who knows where the matcher stands now
        return RowFailed(ErrorKind.GRAMMAR, str(error))

    def forget(self, key: int) -> None:
        """Drop what is held for a request, if anything is."""
        self._matches.pop(key, None)

    # ---- the worker

    def _find_allowed(self, matches: list[_Match], vocab_size: int) -> None:
        for match in matches:
            match.allowed = match.error = None
            try:
                mask = _make_mask(match, vocab_size)
                if mask is not None:
                    match.allowed = self._sets.of(mask, vocab_size)
                    if not match.allowed.num_tokens:
                        match.error = GrammarError("the grammar allows no further token")
            except BaseException as error:  # a panic in Rust is no Exception; others wait too
                match.error = _as_grammar_error(error)


def _as_grammar_error(error: BaseException) -> GrammarError:
    if isinstance(error, GrammarError):
        return error
    return GrammarError(f"the grammar engine failed: {describe_cause(error)}")


def _make_mask(match: _Match, vocab_size: int) -> Mask | None:
    """The mask of the next token; None where there is none, because the output is complete."""
    request = match.request
    if match.matcher is None:
        assert request.grammar is not None
        match.matcher = request.grammar.start()
    missing = request.token_ids[request.num_prompt_tokens + match.num_taken :]
    if missing:
        is_complete = match.matcher.advance(missing)
        match.num_taken += len(missing)
        match.last_taken = missing[-1]
        if is_complete:
            return None
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    match.matcher.fill_mask(mask)
    return mask
