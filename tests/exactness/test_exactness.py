"""Equal tokens, not similar ones: what the engine produces is what `generate` produces for each
prompt alone, in float32, greedily, for every architecture and however requests are scheduled."""

from collections.abc import Callable
from typing import Any

import pytest

from footplate.backend.step import StepPlan

from .architectures import ARCHITECTURES, PAGED, PER_REQUEST, VARIED
from .driver import KERNEL_BLOCK_SIZE, TORCH_BLOCK_SIZE, Case, Driver, Observed

# Older versions of transformers script a function of gpt_bigcode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CaseOf = Callable[[str, int], Case]
PAGED_CASES, FEW_CASES = (
    [
        pytest.param(
            *(name, size),
            id=f"{name}-{backend}",
            marks=pytest.mark.thorough if name in left_out else (),
        )
        for backend, size in (("torch", TORCH_BLOCK_SIZE), ("kernels", KERNEL_BLOCK_SIZE))
        for name in PAGED
    ]
    # In a default run the second list is of a few of them.
    for left_out in ((), PAGED.keys() - set(VARIED))
)
PER_REQUEST_CASES = [pytest.param(name, TORCH_BLOCK_SIZE, id=name) for name in PER_REQUEST]
every_case = pytest.mark.parametrize(
    ("architecture", "block_size"), PAGED_CASES + PER_REQUEST_CASES
)
few_cases = pytest.mark.parametrize(("architecture", "block_size"), FEW_CASES)


@every_case
def test_ragged_prompts_in_chunks_equal_generate(
    architecture: str, block_size: int, case_of: CaseOf
) -> None:
    case = case_of(architecture, block_size)
    runner = Observed(case)
    assert Driver(runner, block_size).run(case.prompts) == case.expected
    assert runner.num_mixed_steps > 0, "no step held both a chunk of a prompt and a decode"


@pytest.mark.parametrize(("architecture", "block_size"), FEW_CASES + PER_REQUEST_CASES)
def test_preempted_requests_equal_generate(
    architecture: str, block_size: int, case_of: CaseOf
) -> None:
    case = case_of(architecture, block_size)
    driver = Driver(Observed(case, num_blocks=-(-72 // block_size)), block_size)
    assert driver.run(case.prompts) == case.expected
    assert driver.stats.num_preemptions > 0


@few_cases
def test_cached_prefixes_equal_generate(
    architecture: str, block_size: int, case_of: CaseOf
) -> None:
    case = case_of(architecture, block_size)
    driver = Driver(case.runner, block_size, enable_prefix_caching=True)
    assert driver.run(case.prompts) == case.expected
    assert driver.stats.prefix_cache_hits == 0
    assert driver.run(case.prompts) == case.expected
    hits = driver.stats.prefix_cache_hits
    assert hits == sum((len(prompt) - 1) // block_size * block_size for prompt in case.prompts)
    # Conversations: what was produced comes back as a prompt, and goes on.
    longer = [
        prompt + output[:6] for prompt, output in zip(case.prompts, case.expected, strict=True)
    ]
    assert driver.run(longer, num_new_tokens=6) == [output[6:] for output in case.expected]
    assert driver.stats.prefix_cache_hits >= 2 * hits > 0


@pytest.mark.parametrize(
    ("attention", "block_size", "architectures"),
    [
        ("paged torch", TORCH_BLOCK_SIZE, PAGED),
        ("paged cpu", KERNEL_BLOCK_SIZE, PAGED),
        ("per-request cache", TORCH_BLOCK_SIZE, PER_REQUEST),
    ],
)
def test_each_architecture_takes_its_path(
    attention: str, block_size: int, architectures: dict[str, Any], case_of: CaseOf
) -> None:
    taken = {name: case_of(name, block_size).runner.facts.model.attention for name in architectures}
    assert all(path.startswith(attention) for path in taken.values()), taken


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_not_degenerate(architecture: str, case_of: CaseOf) -> None:
    expected = case_of(architecture, TORCH_BLOCK_SIZE).expected
    assert len({token for output in expected for token in output}) >= 15


@few_cases
def test_one_damaged_page_is_noticed(architecture: str, block_size: int, case_of: CaseOf) -> None:
    """The proof that the tests above can fail: the tokens do depend on what is in the cache."""
    case = case_of(architecture, block_size)
    paged: Any = case.runner
    values = [layer.values for layer in paged._model._caches.values()]

    def damage_newest_full_page(plan: StepPlan) -> None:
        for request in plan.requests:
            full = request.num_computed_tokens // block_size
            if full:
                for layer in values:
                    layer[request.block_ids[full - 1]] = 0

    runner = Observed(case)
    runner.before_step = damage_newest_full_page
    outputs = Driver(runner, block_size).run(case.prompts)
    assert sum(a != b for a, b in zip(outputs, case.expected, strict=True)) >= 3
