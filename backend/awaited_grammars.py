"""Requests that wait until their grammar is compiled."""

from footplate.backend.live_requests import LiveRequests
from footplate.backend.request import Request, State
from footplate.backend.scheduler import Scheduler
from footplate.backend.structured.interface import CompiledGrammar, CompilesGrammars, GrammarError
from footplate.protocol.messages import ErrorKind, FinishReason
from footplate.protocol.token_params import Grammar


class AwaitedGrammars:
    """Owns who waits for which grammar. Meanwhile the scheduler holds them: they keep their place,
    and can end.

    Args:
        compiler: None compiles nothing: requests with a grammar end with an error.
    """

    def __init__(
        self, compiler: CompilesGrammars | None, scheduler: Scheduler, live: LiveRequests
    ) -> None:
        self._compiler = compiler
        self._scheduler = scheduler
        self._live = live
        # By the key of the first: who waits, and how they end then, if they do.
        self._waiting: dict[int, tuple[list[Request], FinishReason | None]] = {}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def submit(self, requests: list[Request], grammar: Grammar, end: FinishReason | None) -> None:
        """Release a request, or the siblings of one prompt, as soon as their grammar is compiled:
        now, if it is.

        Args:
            end: why their output, which they came with, has come to its end if not by the grammar;
                None lets them go on.
        """
        key = requests[0].key
        outcome: CompiledGrammar | GrammarError | None
        if self._compiler is None:
            outcome = GrammarError("this engine core compiles no grammars")
        else:
            outcome = self._compiler.submit(key, grammar)
        if outcome is None:
            self._waiting[key] = requests, end
        else:
            self._on_compiled(requests, end, outcome)

    def take_compiled(self) -> None:
        """Release those whose grammar has been compiled by now, or end them."""
        assert self._compiler is not None, "nobody compiles what is waited for"
        for key, outcome in self._compiler.take_finished():
            self._on_compiled(*self._waiting.pop(key), outcome)

    def _on_compiled(
        self,
        requests: list[Request],
        end: FinishReason | None,
        outcome: CompiledGrammar | GrammarError,
    ) -> None:
        waited = [r for r in requests if r.state is State.HELD]  # not those that were aborted
        if isinstance(outcome, GrammarError):
            for request in waited:
                self._live.finish(request, FinishReason.ERROR, str(outcome), ErrorKind.GRAMMAR)
        elif end is not None:
            for request in waited:
                # The end of a grammar comes before any other.
                is_complete = _is_complete(outcome, request)
                self._live.finish(request, FinishReason.STOP if is_complete else end)
        else:
            for request in requests:
                request.grammar = outcome
            self._scheduler.release(requests)


def _is_complete(grammar: CompiledGrammar, request: Request) -> bool:
    """Whether the grammar allows nothing behind the output that a request came with."""
    try:
        return grammar.start().advance(request.token_ids[request.num_prompt_tokens :])
    except Exception:  # whatever the engine says of it, the output has an end already
        return False
