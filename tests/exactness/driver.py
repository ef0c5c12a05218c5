"""Runs prompts through the real scheduler and a real runner, without processes in between."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from footplate.backend.engine_core import EngineCore
from footplate.backend.step import ModelRunner, RunnerFacts, StepPlan, StepResult
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest, GetStats, Stats
from footplate.protocol.token_params import TokenParams

NUM_NEW_TOKENS = 12
# Blocks that are no whole pages of our kernels leave attention to torch.
TORCH_BLOCK_SIZE = 4
KERNEL_BLOCK_SIZE = 16
SCHEDULER = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16)
CLIENT = b"client"

# Loads a runner from a folder, with options of `ModelConfig`.
Loader = Callable[..., ModelRunner]


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture's loaded runner, and what `generate` makes of each prompt alone."""

    runner: ModelRunner
    block_size: int
    prompts: list[list[int]]
    expected: list[list[int]]


class Observed:
    """A runner that remembers what its steps were like, and may claim to have fewer blocks."""

    def __init__(self, case: Case, num_blocks: int | None = None) -> None:
        self._runner = case.runner
        self.facts: RunnerFacts = case.runner.facts
        if num_blocks is not None:
            limit = num_blocks * case.block_size
            model = msgspec.structs.replace(self.facts.model, max_model_len=limit)
            self.facts = replace(self.facts, num_kv_blocks=num_blocks, model=model)
        self.num_mixed_steps = 0
        self.before_step: Callable[[StepPlan], None] = lambda plan: None

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_mixed_steps += len({n == 1 for n in plan.num_new_tokens}) == 2
        self.before_step(plan)
        return self._runner.execute(plan)


class Driver:
    """An engine core with one client."""

    def __init__(
        self, runner: ModelRunner, block_size: int, enable_prefix_caching: bool = False
    ) -> None:
        self._core = EngineCore(
            runner,
            CacheConfig(block_size=block_size, enable_prefix_caching=enable_prefix_caching),
            SCHEDULER,
            epoch=1,
            clock=lambda: 0.0,
        )
        self._core.join(CLIENT)
        self._num_requests = 0

    def run(
        self, prompts: list[list[int]], num_new_tokens: int = NUM_NEW_TOKENS
    ) -> list[list[int]]:
        """All prompts at once, greedily; return the new tokens of each."""
        params = TokenParams(0.0, 1.0, 0, 0.0, 0, num_new_tokens, 0, ())
        first = self._num_requests
        self._num_requests += len(prompts)
        for number, prompt in enumerate(prompts):
            self._core.handle(CLIENT, AddRequest(first + number, list(prompt), params))
        outputs: list[list[int]] = [[] for _ in prompts]
        while self._core.has_work:
            self._core.step()
            for _, message in self._core.take_outputs():
                for finished in message.finished:
                    assert not finished.message, finished.message
                for handle, token in zip(message.handles, message.token_ids, strict=True):
                    outputs[handle - first].append(token)
        self._core.check_ledger()
        return outputs

    @property
    def stats(self) -> Stats:
        """The core's books."""
        reply = self._core.handle(CLIENT, GetStats(0))
        assert reply is not None and reply.stats is not None
        return reply.stats
