"""What the scheduler hands to a model runner for one step, and what a runner is."""

from dataclasses import dataclass, field
from typing import Protocol

from footplate.backend.request import Request
from footplate.protocol.messages import ModelFacts


@dataclass(slots=True)
class StepPlan:
    """One iteration of continuous batching (Orca, Yu et al., OSDI '22, section 3).

    Attributes:
        requests: in the order in which they stand in the flattened batch.
        num_new_tokens: for each of them, how many tokens to compute from
            `num_computed_tokens` on: one for a decode, more for a chunk of the prompt.
        sampling: indices into `requests` of those whose last token is among the new ones, so
            that a next token is to be sampled. Ascending.
        released: keys of requests that lost their blocks (finished or preempted) since the
            plan before. A runner drops what it holds for them before it looks at `requests`: a
            preempted request may stand in both.
    """

    requests: list[Request] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    sampling: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens in the flattened batch."""
        return sum(self.num_new_tokens)


@dataclass(frozen=True, slots=True)
class RunnerFacts:
    """What a loaded model runner knows and the engine core needs.

    Attributes:
        model: facts for the clients.
        num_kv_blocks: how many blocks of the KV cache there are; ids are 0 to num_kv_blocks - 1.
        supports_prefix_caching: False where state is not addressed by block (recurrent models).
    """

    model: ModelFacts
    num_kv_blocks: int
    supports_prefix_caching: bool


class ModelRunner(Protocol):
    """Computes tokens. Owns the weights, the KV cache's memory and its layout; knows block ids
    from the plan and nothing of how they were chosen."""

    @property
    def facts(self) -> RunnerFacts:
        """Fixed once the runner is built."""
        ...

    def execute(self, plan: StepPlan) -> list[int]:
        """Run one step; return the sampled token of each request in `plan.sampling`. A plan
        without requests only releases."""
        ...
