"""Prompts that have to be computed here, whatever the prefix cache has of them: their logprobs are
wanted, or the request wants to read nothing from the cache."""

from footplate.backend.logits.wanted import wants_prompt_logprobs
from footplate.backend.request import Request
from footplate.backend.step import StepPlan, StepResult


class PromptReading:
    """Keeps `Request.num_scored`: how much of such a prompt is behind it.

    Args:
        max_scored_rows: see `RunnerFacts`.
    """

    def __init__(self, max_scored_rows: int) -> None:
        self._max_scored_rows = max_scored_rows
        self._unscored: list[Request] = []  # of the current plan: no logprobs come of them

    def begin(self, request: Request) -> None:
        """A request is new."""
        params = request.params
        if params.skip_reading_prefix_cache:
            request.num_scored = 0
        elif params.logprobs is not None and wants_prompt_logprobs(request):
            first = max(1, params.logprobs.prompt_start)
            request.num_scored = min(first, request.num_prompt_tokens)
        else:
            request.num_scored = request.num_prompt_tokens

    def begin_plan(self) -> None:
        """Forget the plan before."""
        self._unscored.clear()

    def limit(self, request: Request, count: int) -> int:
        """How many of `count` tokens may be computed in the step that is being planned: each row of
        logits that is scored takes memory."""
        if request.num_scored < request.num_prompt_tokens:
            if wants_prompt_logprobs(request):
                return min(count, self._max_scored_rows)
            self._unscored.append(request)
        return count

    def count(self, plan: StepPlan, result: StepResult) -> None:
        """Take note of what a step has computed, which the requests know of already."""
        for request in self._unscored:
            num_computed = min(request.num_computed_tokens, request.num_prompt_tokens)
            request.num_scored = max(request.num_scored, num_computed)
        for index, rows in result.prompt_logprobs.items():
            # Not what was computed: a runner may collect the chunks of a prompt, and tell of all
            # its rows with the last.
            request = plan.requests[index]
            request.num_scored = max(request.num_scored, rows.position + len(rows.ranks))
