"""Same request, same answer, also for one of n and for one that goes on behind its own output: on
our CPU kernels its tokens are those of the request made alone with that seed, from the start."""

import msgspec
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.step import ModelRunner
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest
from footplate.protocol.token_params import TokenParams

from .architectures import VOCAB_SIZE, make_model
from .driver import KERNEL_BLOCK_SIZE, Loader

CLIENT = b"client"
SEED = 1234
PARAMS = TokenParams(1.0, 1.0, 0, 0.0, SEED, 20, 0, ())
PROMPT = [(i * 37 + 5) % VOCAB_SIZE for i in range(50)]  # three full blocks, and two tokens


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def runner(
    request: pytest.FixtureRequest, load: Loader, tmp_path_factory: pytest.TempPathFactory
) -> ModelRunner:
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder)
    return load(folder, KERNEL_BLOCK_SIZE, dtype="bfloat16")


def run(
    runner: ModelRunner, *messages: AddRequest, caching: bool = True, max_num_seqs: int = 4
) -> dict[int, list[int]]:
    """The new tokens of every handle."""
    core = EngineCore(
        runner,
        CacheConfig(block_size=KERNEL_BLOCK_SIZE, enable_prefix_caching=caching),
        SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=24),
        epoch=1,
        clock=lambda: 0.0,
    )
    core.join(CLIENT)
    for message in messages:
        core.handle(CLIENT, message)
    tokens: dict[int, list[int]] = {}
    while core.has_work:
        core.step()
        core.check_ledger()
        for _, outputs in core.take_outputs():
            assert not any(finished.message for finished in outputs.finished)
            for handle, token in zip(outputs.handles, outputs.token_ids, strict=True):
                tokens.setdefault(handle, []).append(token)
    return tokens


def alone(runner: ModelRunner, seed: int) -> list[int]:
    params = msgspec.structs.replace(PARAMS, seed=seed)
    return run(runner, AddRequest(0, PROMPT, params), caching=False)[0]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_each_of_n_is_the_request_alone_with_its_seed(
    runner: ModelRunner, caching: bool, max_num_seqs: int
) -> None:
    siblings = AddRequest(0, PROMPT, PARAMS, n=6)
    together = run(runner, siblings, caching=caching, max_num_seqs=max_num_seqs)
    assert together == {index: alone(runner, SEED + index) for index in range(6)}
    assert len(set(map(tuple, together.values()))) == 6


@pytest.mark.parametrize("num_prior", [1, 13, 14, 15, 19])
def test_a_request_goes_on_behind_its_own_output(runner: ModelRunner, num_prior: int) -> None:
    whole = alone(runner, SEED)
    prior = AddRequest(0, PROMPT, PARAMS, prior_token_ids=whole[:num_prior])
    assert run(runner, prior) == {0: whole[num_prior:]}
