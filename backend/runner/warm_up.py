"""The first step of a process pays for what later ones find ready: kernels that are chosen by
shape, threads that start, memory that is touched. No request should pay for that."""

from footplate.backend.request import Request
from footplate.backend.step import ModelRunner, StepPlan
from footplate.protocol.token_params import TokenParams

NUM_TOKENS = 8


def warm_up(runner: ModelRunner) -> None:
    """Run a prompt and a decode, greedy and sampled, through block 0, and forget them.

    What they leave in the block is harmless: whoever gets it writes before reading.
    """
    for temperature in (0.0, 1.0):
        request = dummy_request(temperature)
        runner.execute(StepPlan([request], [NUM_TOKENS], [0]))
        request.num_computed_tokens = NUM_TOKENS
        request.token_ids.append(0)
        runner.execute(StepPlan([request], [1], [0]))
        runner.execute(StepPlan(released=[request.key]))


def dummy_request(temperature: float) -> Request:
    """A request that nobody made: `NUM_TOKENS` tokens, every block of its table block 0."""
    params = TokenParams(temperature, 1.0, 0, 0.0, 0, 1, 0, ())
    return Request(
        key=-1,
        client=b"",
        handle=-1,
        token_ids=[0] * NUM_TOKENS,
        num_prompt_tokens=NUM_TOKENS,
        params=params,
        block_ids=[0] * (NUM_TOKENS + 1),
    )
