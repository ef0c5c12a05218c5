"""The runner for models with paged attention: all requests of a step in one forward."""

from contextlib import nullcontext

from footplate.backend.runner.batch import RaggedBatch
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.sampler import Sampler
from footplate.backend.runner.thread_governor import ThreadGovernor
from footplate.backend.step import RunnerFacts, StepPlan, StepResult


class PagedRunner:
    """A `ModelRunner` without memory of its own: what it knows of a request is in the plan, and
    in the pages that the plan names. So `released` means nothing to it, and a step can be run
    twice.

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
        if not plan.requests:
            return StepResult()
        batch = RaggedBatch.of_plan(plan, self._block_size)
        with self._governor.step(len(batch.token_ids)) if self._governor else nullcontext():
            logits = self._model.forward(batch)
        return StepResult(self._sampler.sample(logits, [plan.requests[i] for i in plan.sampling]))
