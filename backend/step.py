"""What the scheduler hands to a model runner for one step, and what a runner is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from footplate.backend.request import Request
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import ErrorKind, ModelFacts


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
        admitted: who was given blocks since the plan before; None is unknown.
    """

    requests: list[Request] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    sampling: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    admitted: list[Request] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the flattened batch."""
        return sum(self.num_new_tokens)


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one request cannot go on. Its neighbours are not affected.

    Attributes:
        is_corrupted: what the model made of it is no number, so its keys and values are no good to
            anybody either.
    """

    kind: ErrorKind
    message: str
    is_corrupted: bool = False


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Logprobs of consecutive tokens; fields as in `LogprobRows`."""

    position: int
    ranks: list[int]
    token_ids: bytes
    logprobs: bytes


@dataclass(slots=True)
class StepResult:
    """What a runner computed for a plan.

    Attributes:
        token_ids: the sampled token of each request in `plan.sampling`, in that order.
        errors: requests that cannot go on, by index into `plan.sampling`; their token means
            nothing.
        complete: indices into `plan.sampling` of requests whose grammar allows nothing more behind
            this token.
        already_complete: indices into `plan.sampling` of requests whose grammar allows nothing
            more behind the output that they came with: they end without a token, and the one in
            `token_ids` means nothing.
        logprobs: of sampled tokens, by index into `plan.sampling`.
        prompt_logprobs: of prompt tokens, by index into `plan.requests`.
        failed: requests of which nothing could be computed, and never will be, by index into
            `plan.requests`. They stand in `plan.requests` only.
        short_of_memory: likewise indices of those for which others must make room first.
    """

    token_ids: list[int] = field(default_factory=list)
    errors: dict[int, RowError] = field(default_factory=dict)
    complete: set[int] = field(default_factory=set)
    already_complete: set[int] = field(default_factory=set)
    logprobs: dict[int, ScoredRows] = field(default_factory=dict)
    prompt_logprobs: dict[int, ScoredRows] = field(default_factory=dict)
    failed: dict[int, RowError] = field(default_factory=dict)
    short_of_memory: set[int] = field(default_factory=set)


def failures(plan: StepPlan, result: StepResult) -> list[tuple[Request, RowError]]:
    """Who cannot go on, and why."""
    if not result.failed and not result.errors:
        return []
    requests = plan.requests
    found = [(requests[index], error) for index, error in result.failed.items()]
    rows = [(requests[plan.sampling[row]], error) for row, error in result.errors.items()]
    return found + rows


def produced(plan: StepPlan, result: StepResult) -> list[tuple[Request, int]]:
    """Who got a token, and which, in the order of `plan.sampling`."""
    requests = plan.requests
    pairs = list(zip([requests[index] for index in plan.sampling], result.token_ids, strict=True))
    if result.errors or result.already_complete:
        without = result.errors.keys() | result.already_complete
        pairs = [pair for row, pair in enumerate(pairs) if row not in without]
    return pairs


@dataclass(frozen=True, slots=True)
class RunnerFacts:
    """What a loaded model runner knows and the engine core needs.

    Attributes:
        model: facts for the clients.
        num_kv_blocks: how many blocks of the KV cache there are; ids are 0 to num_kv_blocks - 1.
        supports_prefix_caching: False where state is not addressed by block (recurrent models).
        max_scored_rows: most prompt tokens of one request whose logits are wanted in one step:
            a row of logits is as long as the vocabulary.
    """

    model: ModelFacts
    num_kv_blocks: int
    supports_prefix_caching: bool
    max_scored_rows: int = 2**31 - 1


class ModelRunner(Protocol):
    """Computes tokens. Owns the weights, the KV cache's memory and its layout; knows block ids
    from the plan and nothing of how they were chosen."""

    @property
    def facts(self) -> RunnerFacts:
        """Fixed once the runner is built."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. A plan without requests only releases."""
        ...


OnProgress = Callable[[str, float], None]
# A model that is loaded waits in one of these for its KV cache.
MakeRunner = Callable[[CacheConfig, SchedulerConfig, OnProgress], ModelRunner]
