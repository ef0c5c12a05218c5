"""The runner for models with paged attention: all requests of a step in one forward."""

from contextlib import nullcontext

from footplate.backend.logits.wanted import prompt_positions
from footplate.backend.runner.batch import RaggedBatch
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.sampler import Sampler
from footplate.backend.runner.thread_governor import ThreadGovernor
from footplate.backend.step import RunnerFacts, StepPlan, StepResult


class PagedRunner:
    """A `ModelRunner` without memory of its own: what it knows of a request is in the plan, and
    in the pages that the plan names. What its sampler remembers follows from the plan's requests,
    so a step can be run twice.

    Args:
        governor: None leaves the number of threads as it is.
    """

    def __init__(
        self,
        model: PagedModel,
        facts: RunnerFacts,
        block_size: int,
        sampler: Sampler,
        governor: ThreadGovernor | None = None,
    ) -> None:
        self.facts = facts
        self._governor = governor
        self._model = model
        self._block_size = block_size
        self._sampler = sampler

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        self._sampler.forget(plan.released)
        if not plan.requests:
            return StepResult()
        requests = [plan.requests[i] for i in plan.sampling]
        scored = _scored_positions(plan)
        batch = RaggedBatch.of_plan(plan, self._block_size, scored)
        self._sampler.prepare(requests, self.facts.model.vocab_size)
        with self._governor.step(len(batch.token_ids)) if self._governor else nullcontext():
            logits = self._model.forward(batch)
        if not scored:
            return self._sampler.sample(logits, requests)
        result = self._sampler.sample(logits[: len(requests)], requests)
        first = len(requests)
        for index, positions in scored.items():
            rows = logits[first : first + len(positions)]
            first += len(positions)
            result.prompt_logprobs[index] = self._sampler.score_prompt(
                rows, plan.requests[index], positions
            )
        return result


def _scored_positions(plan: StepPlan) -> dict[int, range]:
    """The prompt positions to be scored in this step, by index into `plan.requests`."""
    scored: dict[int, range] = {}
    for index, request in enumerate(plan.requests):
        if request.params.logprobs is not None:
            start = request.num_computed_tokens
            positions = prompt_positions(request, start, start + plan.num_new_tokens[index])
            if positions:
                scored[index] = positions
    return scored
