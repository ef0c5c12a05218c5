"""Steps that fail cost nobody but the request that makes them fail.

A step that raises is void, and is run again in halves until the culprit stands alone: keys and
values are written by position, and what runners remember of requests follows from their tokens, so
whatever half of a step had been done is simply done once more. A step that does not fit into memory
is halved the same way, and so is a chunk of a prompt that is alone and still too large.
"""

import errno
import logging
import traceback
from dataclasses import dataclass

from footplate.backend.cause import describe_cause
from footplate.backend.request import Request
from footplate.backend.step import ModelRunner, RowError, StepPlan, StepResult
from footplate.protocol.messages import ErrorKind

logger = logging.getLogger(__name__)

# After so many steps of which none was too large, twice as much is tried again.
STEPS_TO_RECOVER = 64
NO_LIMIT = 2**31 - 1
# How allocators without a type of error of their own say that there is nothing left.
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
)


class StepGuard:
    """Runs plans on a model runner. Knows no scheduler: what could not be computed is in what it
    returns.

    Attributes:
        num_void_steps: steps that raised and were run again in parts.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.num_void_steps = 0
        self._runner = runner
        self._most_tokens = NO_LIMIT  # of one part of a step, learnt from what did not fit
        self._num_fitting_steps = 0

    def execute(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        """Run one step.

        Returns:
            What was really computed, and its result. Usually that is `plan` itself. Otherwise
            requests in `StepResult.failed` and `StepResult.short_of_memory` have no new tokens and
            do not sample, and a chunk may have become shorter.

        Raises:
            Exception: the runner is broken: it fails with each of several requests, or has lost
                its device. No other request would fare better.
        """
        if self._most_tokens < NO_LIMIT and not self._fits(plan):
            return self._execute_parts(plan, None)
        try:
            return plan, self._runner.execute(plan)
        except Exception as error:
            if not plan.requests or is_device_lost(error):
                raise
            failure = self._void(plan, error)
        # Outside of the handler: an exception holds on to all that its frames had allocated.
        return self._execute_parts(plan, failure)

    def _fits(self, plan: StepPlan) -> bool:
        """Whether a step is small enough, by what is known; takes the limit back in time."""
        fits = plan.num_tokens <= self._most_tokens
        self._num_fitting_steps += 1
        if self._num_fitting_steps >= STEPS_TO_RECOVER:
            self._num_fitting_steps = 0
            self._most_tokens = min(2 * self._most_tokens, NO_LIMIT)
            logger.info("steps may have %d tokens again", self._most_tokens)
        return fits

    def _void(self, plan: StepPlan, error: Exception) -> "_Failure":
        self.num_void_steps += 1
        size = f"{len(plan.requests)} requests and {plan.num_tokens} tokens"
        logger.warning("a step of %s is run again in parts: it raised", size, exc_info=error)
        return _Failure.of(error)

    def _execute_parts(
        self, plan: StepPlan, failure: "_Failure | None"
    ) -> tuple[StepPlan, StepResult]:
        parts = _Parts(plan)
        if failure is None:
            if plan.released:
                self._runner.execute(StepPlan(released=plan.released))
            failure = _TOO_LARGE
        self._recover(parts, range(len(plan.requests)), failure)
        if parts.has_overflowed and parts.most_tokens:
            self._most_tokens, self._num_fitting_steps = parts.most_tokens, 0
        if parts.root_cause is not None and 1 < len(plan.requests) == len(parts.result.failed):
            raise parts.root_cause
        return parts.done, parts.result

    def _recover(self, parts: "_Parts", wanted: range, failure: "_Failure") -> None:
        """Compute requests that have failed together, by index into the plan's."""
        parts.has_overflowed |= failure.is_memory and failure is not _TOO_LARGE
        if len(wanted) == 1:
            self._recover_one(parts, wanted.start, failure)
            return
        first, second = parts.halve(wanted, by_tokens=failure.is_memory)
        first_failure = self._try(parts, first)
        if first_failure is not None:
            self._recover(parts, first, first_failure)
        elif len(second) > 1 and not failure.is_memory:
            # The culprit is in there, so all of them together would fail once more.
            self._recover(parts, second, failure)
            return
        second_failure = self._try(parts, second)
        if second_failure is not None:
            self._recover(parts, second, second_failure)

    def _recover_one(self, parts: "_Parts", index: int, failure: "_Failure") -> None:
        """A request that has failed alone: a shorter chunk of it may fit. One that was alone from
        the start has failed only once, which may have been an accident."""
        is_one_token = parts.plan.num_new_tokens[index] == 1
        if len(parts.plan.requests) == 1 and (is_one_token or not failure.is_memory):
            once_more = self._try(parts, range(index, index + 1))
            if once_more is None:
                return
            failure = once_more
        count = parts.plan.num_new_tokens[index]
        while failure.is_memory and count > 1:
            count = self._most_tokens if failure is _TOO_LARGE else count // 2
            shorter = self._try(parts, range(index, index + 1), count)
            if shorter is None:
                return
            failure = shorter
        parts.fail(index, failure)

    def _try(self, parts: "_Parts", wanted: range, count: int | None = None) -> "_Failure | None":
        """Run a part of the step, and keep its result; why not, if that is impossible.

        Args:
            count: how many tokens of the only request to compute; None is all of them.
        """
        part = parts.part(wanted, count)
        if part.num_tokens > self._most_tokens:
            return _TOO_LARGE
        try:
            result = self._runner.execute(part)
        except Exception as error:
            if is_device_lost(error):
                raise
            return _Failure.of(error)
        parts.keep(wanted, part, result)
        return None


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a part of a step did not come about."""

    cause: str
    is_memory: bool
    error: Exception | None

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        _let_go(error)
        return cls(describe_cause(error), is_out_of_memory(error), error)


_TOO_LARGE = _Failure("larger than what has fitted lately", is_memory=True, error=None)


class _Parts:
    """Owns what has come out so far of a plan that is computed in parts, from its first request to
    its last.

    Attributes:
        plan: what was to be computed.
        done: what of it has been.
        root_cause: what was raised for the first request that failed alone.
        has_overflowed: whether a part did not fit into memory.
        most_tokens: of the largest part that did.
    """

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.done = StepPlan(plan.requests, [0] * len(plan.requests), released=plan.released)
        self.result = StepResult()
        self.root_cause: Exception | None = None
        self.has_overflowed = False
        self.most_tokens = 0
        self._samples = set(plan.sampling)

    def halve(self, wanted: range, *, by_tokens: bool) -> tuple[range, range]:
        """Two parts of about the same number of requests, or of tokens."""
        middle = (wanted.start + wanted.stop) // 2
        if by_tokens:
            counts = self.plan.num_new_tokens
            half = sum(counts[wanted.start : wanted.stop]) / 2
            middle, num_tokens = wanted.start + 1, counts[wanted.start]
            while middle < wanted.stop - 1 and num_tokens + counts[middle] <= half:
                num_tokens += counts[middle]
                middle += 1
        return range(wanted.start, middle), range(middle, wanted.stop)

    def part(self, wanted: range, count: int | None) -> StepPlan:
        """A plan for some of the requests. The runner has been told already who was released."""
        start, stop = wanted.start, wanted.stop
        if count is not None and count < self.plan.num_new_tokens[start]:
            return StepPlan([self.plan.requests[start]], [count])
        return StepPlan(
            self.plan.requests[start:stop],
            self.plan.num_new_tokens[start:stop],
            [index - start for index in wanted if index in self._samples],
        )

    def keep(self, wanted: range, part: StepPlan, result: StepResult) -> None:
        """Put the result of a part behind those of the parts before it."""
        self.most_tokens = max(self.most_tokens, part.num_tokens)
        all_of_it, start, row = self.result, wanted.start, len(self.result.token_ids)
        self.done.num_new_tokens[start : wanted.stop] = part.num_new_tokens
        self.done.sampling += [start + index for index in part.sampling]
        all_of_it.token_ids += result.token_ids
        all_of_it.errors |= {row + r: error for r, error in result.errors.items()}
        all_of_it.complete |= {row + r for r in result.complete}
        all_of_it.already_complete |= {row + r for r in result.already_complete}
        all_of_it.logprobs |= {row + r: rows for r, rows in result.logprobs.items()}
        all_of_it.prompt_logprobs |= {
            start + index: rows for index, rows in result.prompt_logprobs.items()
        }

    def fail(self, index: int, failure: _Failure) -> None:
        """A request cannot be computed, whatever is left away."""
        request = self.plan.requests[index]
        if not failure.is_memory:
            error = RowError(ErrorKind.INTERNAL, f"the request made its step fail: {failure.cause}")
        elif len(self.plan.requests) > 1 and not _has_been_short(request):
            self.result.short_of_memory.add(index)
            return
        else:
            words = "a step with this request alone does not fit into memory"
            if len(self.plan.requests) > 1:
                words = "the request does not fit into memory, though another has made room"
            error = RowError(ErrorKind.MEMORY, f"{words}: {failure.cause}")
        self.result.failed[index] = error
        if self.root_cause is None:
            self.root_cause = failure.error


def _has_been_short(request: Request) -> bool:
    """Whether others have made room for this very token already."""
    return request.short_at == len(request.token_ids)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller step might succeed: Python's allocator, torch's, or one below them has
    nothing left."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = describe_cause(error) if isinstance(error, RuntimeError) else ""
    return any(words in text for words in OUT_OF_MEMORY_TEXTS)


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing can be computed any more: after most errors a CUDA context is of no use, to
    whatever request."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in describe_cause(error)


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: the tensors of the step that failed. The next one
    needs their memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
