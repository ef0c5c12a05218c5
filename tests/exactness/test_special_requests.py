"""Requests that change their logits and ask for logprobs are answered alike, too: the same tokens
and the same bits of every logprob of output and prompt, alone and in company, however the prompt
is cut into chunks, over a cold and a warm prefix cache, preempted or not."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from footplate.backend.step import ModelRunner, RunnerFacts, ScoredRows, StepPlan, StepResult
from footplate.protocol.messages import AddRequest
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    ThinkingBudget,
    TokenParams,
)

from .architectures import VOCAB_SIZE, make_model
from .driver import KERNEL_BLOCK_SIZE, Case, Loader, Observed
from .test_invariance import (
    NUM_NEW_TOKENS,
    PRECISIONS,
    TARGET,
    DifferentError,
    random_params,
    random_prompt,
    tokens_of_target,
)

Row = tuple[int, bytes, bytes]  # rank, ids, scores


class RecordingRunner:
    """A runner that remembers the target's logprobs by position, and finds them the same whenever
    they are computed again."""

    def __init__(self, runner: ModelRunner | Observed) -> None:
        self._runner = runner
        self.facts: RunnerFacts = runner.facts
        self.output: dict[int, Row] = {}
        self.prompt: dict[int, Row] = {}
        self.num_released = 0

    def execute(self, plan: StepPlan) -> StepResult:
        result = self._runner.execute(plan)
        if result.errors:
            raise DifferentError(f"rows failed: {result.errors}")
        self.num_released += len(plan.released)
        for index, place in enumerate(plan.sampling):
            if plan.requests[place].handle == TARGET:
                self._record(self.output, result.logprobs[index])
        for place, scored in result.prompt_logprobs.items():
            if plan.requests[place].handle == TARGET:
                self._record(self.prompt, scored)
        return result

    def _record(self, seen: dict[int, Row], scored: ScoredRows) -> None:
        for position, row in enumerate(rows_of(scored), scored.position):
            if seen.setdefault(position, row) != row:
                raise DifferentError(f"{position} was scored differently")


def rows_of(scored: ScoredRows) -> Iterator[Row]:
    width = len(scored.token_ids) // len(scored.ranks)
    for index, rank in enumerate(scored.ranks):
        part = slice(index * width, (index + 1) * width)
        yield rank, scored.token_ids[part], scored.logprobs[part]


def some_ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(count))


def special_params(rng: random.Random) -> TokenParams:
    adjustments = LogitAdjustments(
        presence_penalty=rng.choice([0.0, 0.7, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.2, 0.9]),
        logit_bias={token_id: rng.uniform(-5, 5) for token_id in some_ids(rng, 20)},
        allowed_token_ids=rng.choice([None, some_ids(rng, 120)]),
        bad_words=tuple(some_ids(rng, rng.choice([1, 2])) for _ in range(30)),
        thinking=rng.choice([None, ThinkingBudget(3, some_ids(rng, 1), some_ids(rng, 2))]),
    )
    logprobs = LogprobsRequest(
        num_logprobs=rng.choice([0, 3, -1]),
        token_ids=some_ids(rng, 2),
        num_prompt_logprobs=rng.choice([0, 5]),
        prompt_start=rng.choice([0, 0, 5]),
        mode=rng.choice(list(LogprobsMode)),
    )
    return msgspec.structs.replace(random_params(rng), adjustments=adjustments, logprobs=logprobs)


def special_requests(rng: random.Random, handles: Sequence[int]) -> list[AddRequest]:
    return [
        AddRequest(handle, random_prompt(rng), rng.choice([special_params, random_params])(rng))
        for handle in handles
    ]


@pytest.fixture(scope="module")
def case_of(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    def make(architecture: str, precision: str) -> Case:
        folder: Path = tmp_path_factory.mktemp(architecture)
        make_model(architecture).save_pretrained(folder)
        runner = load(folder, KERNEL_BLOCK_SIZE, **PRECISIONS[precision])
        assert runner.facts.model.attention.startswith("paged cpu")
        return Case(runner, KERNEL_BLOCK_SIZE, [], [])

    return make


@pytest.mark.parametrize(
    ("architecture", "precision"), [("llama", "float32"), ("qwen2_moe", "bfloat16, int8")]
)
def test_tokens_and_logprobs_are_the_same_in_any_company(
    architecture: str, precision: str, case_of: Callable[[str, str], Case]
) -> None:
    case = case_of(architecture, precision)
    num_preempted = 0
    for seed in range(6):
        rng = random.Random(f"{architecture} {precision} {seed}")
        params = special_params(rng)
        assert params.logprobs is not None
        target = AddRequest(TARGET, random_prompt(rng), params)
        neighbours = special_requests(rng, range(1, rng.choice([4, 12, 30])))
        runner = RecordingRunner(case.runner)
        [alone] = tokens_of_target(runner, target, [], rng)
        assert len(alone) == NUM_NEW_TOKENS
        assert runner.output.keys() == set(range(NUM_NEW_TOKENS))
        first = max(1, params.logprobs.prompt_start)
        assert runner.prompt.keys() == set(range(first, len(target.prompt_token_ids)))
        assert tokens_of_target(runner, target, neighbours, rng, rounds=2) == [alone, alone]
        # The rows of the runs before are still there to be compared with.
        runner._runner = crowded = Observed(case, num_blocks=12)
        runner.facts, runner.num_released = crowded.facts, 0
        assert tokens_of_target(runner, target, neighbours[:8], rng) == [alone]
        num_preempted += runner.num_released - len(neighbours[:8]) - 1
    assert num_preempted > 0


def test_a_difference_would_be_noticed(case_of: Callable[[str, str], Case]) -> None:
    """The proof that the test above can fail."""
    rng = random.Random(0)
    runner = RecordingRunner(case_of("llama", "float32").runner)
    params = msgspec.structs.replace(
        special_params(rng), logprobs=LogprobsRequest(0, num_prompt_logprobs=0)
    )
    tokens_of_target(runner, AddRequest(TARGET, [1, 2, 3], params), [], rng)
    with pytest.raises(DifferentError, match="was scored differently"):
        tokens_of_target(runner, AddRequest(TARGET, [1, 4, 3], params), [], rng)
