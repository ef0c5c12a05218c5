"""Which tokens the grammars of requests allow next: masks that are made while the model computes
the logits that they are for."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from footplate.backend.logits.errors import RowFailed
from footplate.backend.request import Request
from footplate.backend.structured.interface import GrammarError, Matcher
from footplate.protocol.messages import ErrorKind

Mask = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Match:
    """A request's matcher, and how much of the output it has taken."""

    request: Request
    matcher: Matcher
    num_taken: int = 0
    last_taken: int = -1
    # As long as it is not done, the worker has the matcher. None: the output is complete.
    mask: "Future[Mask | None] | None" = None
    mask_position: int = -1  # in the output


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

    def __len__(self) -> int:
        return len(self._matches)

    def prepare(self, requests: Iterable[Request], vocab_size: int) -> None:
        """Begin to make the masks of the next tokens of these requests."""
        for request in requests:
            match = self._match_of(request)
            position = request.num_output_tokens
            if match.mask is None or match.mask_position != position:
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, "grammar masks")
                match.mask = self._worker.submit(_make_mask, match, vocab_size)
                match.mask_position = position

    def _match_of(self, request: Request) -> _Match:
        grammar = request.grammar
        assert grammar is not None
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
        match = self._matches[request.key] = _Match(request, grammar.start())
        return match

    def _wait_for(self, match: _Match) -> None:
        """Have the matcher back from the worker, which may hold it when a step has failed."""
        if match.mask is not None:
            match.mask.exception()

    def allowed(self, request: Request, vocab_size: int) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, bool [vocab_size]; None where the output is complete, and
        the grammar allows nothing behind it.

        Raises:
            RowFailed: the output has left its grammar, the grammar's limits are exceeded, or it
                allows no token at all.
        """
        self.prepare([request], vocab_size)
        future = self._matches[request.key].mask
        assert future is not None
        try:
            mask = future.result()
        except GrammarError as error:
            raise self._fail(request, error) from error
        if mask is None:
            return None
        allowed = np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little")
        if not allowed.any():
            raise RowFailed(ErrorKind.GRAMMAR, "the grammar allows no further token")
        return allowed.view(np.bool_)

    def advance(self, request: Request, token_id: int) -> bool:
        """Take the token that was chosen; whether the grammar allows nothing more behind it.

        Raises:
            RowFailed: the grammar does not allow the token, or its limits are exceeded.
        """
        match = self._matches[request.key]
        self._wait_for(match)
        try:
            is_complete = match.matcher.advance([token_id])
        except GrammarError as error:
            raise self._fail(request, error) from error
        match.num_taken += 1
        match.last_taken = token_id
        return is_complete

    def _fail(self, request: Request, error: GrammarError) -> RowFailed:
        self.forget(request.key)  # who knows where the matcher stands now
        return RowFailed(ErrorKind.GRAMMAR, str(error))

    def forget(self, key: int) -> None:
        """Drop what is held for a request, if anything is."""
        self._matches.pop(key, None)


def _make_mask(match: _Match, vocab_size: int) -> Mask | None:
    request = match.request
    missing = request.token_ids[request.num_prompt_tokens + match.num_taken :]
    if missing:
        is_complete = match.matcher.advance(missing)
        match.num_taken += len(missing)
        match.last_taken = missing[-1]
        if is_complete:
            return None
    # Bits behind the vocabulary are nobody's, whatever the matcher writes there.
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    match.matcher.fill_mask(mask)
    return mask
