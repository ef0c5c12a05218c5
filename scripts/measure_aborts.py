#!/usr/bin/env python3
"""Measure how long an engine core is busy with ten thousand aborts in one message.

scripts/measure_aborts.py                        10,000 requests, 256 of them running
scripts/measure_aborts.py --num-running 5000
"""

import time
from random import Random
from typing import Annotated

from cyclopts import App, Parameter

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.runner.load import DEMO_MODEL
from footplate.protocol.codec import Encoder, client_message_decoder
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import AbortRequests, AddRequest
from footplate.protocol.token_params import TokenParams

CLIENT = b"client"
PROMPT = list(range(20, 36))
PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 1000, 0, ())

app = App(help=__doc__)


def full_core(num_requests: int, num_running: int, num_siblings: int) -> EngineCore:
    """A core over the fake model in which so many run and the rest waits, with the first and last
    handles 1 and `num_requests`.

    Args:
        num_siblings: of each prompt of the last tenth of all: they are held until it is computed.
    """
    cache = CacheConfig(num_gpu_blocks_override=4 * num_running + 2048)
    runner = FakeModelRunner(ModelConfig(model="fake", max_model_len=2048), cache, DEMO_MODEL)
    scheduler = SchedulerConfig(
        max_num_seqs=num_running, max_num_batched_tokens=len(PROMPT) * num_running
    )
    core = EngineCore(runner, cache, scheduler, 1, time.monotonic)
    core.join(CLIENT)
    num_alone = num_requests - num_requests // 10
    for handle in range(1, num_alone + 1):
        core.handle(CLIENT, AddRequest(handle, PROMPT, PARAMS))
    for handle in range(num_alone + 1, num_requests + 1, num_siblings):
        n = min(num_siblings, num_requests + 1 - handle)
        core.handle(CLIENT, AddRequest(handle, PROMPT, PARAMS, n=n))
    for _ in range(3):
        core.step()
        core.take_outputs()
    return core


@app.default
def main(
    *,
    num_requests: Annotated[int, Parameter(help="Aborted at once.")] = 10_000,
    num_running: Annotated[int, Parameter(help="Of them, when they are aborted.")] = 256,
    num_siblings: Annotated[int, Parameter(help="Per prompt, of the last tenth.")] = 100,
    seed: Annotated[int, Parameter(help="Of the order in which they are aborted.")] = 1,
    repeats: Annotated[int, Parameter(help="The best is printed, and the median.")] = 9,
) -> None:
    """Print milliseconds: of the abort itself, and of the step and the message that tell of it."""
    aborting, telling = [], []
    encode, decode = Encoder().encode, client_message_decoder().decode
    handles = list(range(1, num_requests + 1))
    Random(seed).shuffle(handles)
    # By the core's other thread, while the model computes.
    message = decode(encode(AbortRequests(handles)))
    assert isinstance(message, AbortRequests)
    for _ in range(repeats):
        core = full_core(num_requests, num_running, num_siblings)
        before = core.stats()
        assert before.num_running == num_running
        assert before.num_running + before.num_waiting == num_requests
        since = time.perf_counter()
        core.handle(CLIENT, message)
        aborted = time.perf_counter()
        core.step()
        for _, outputs in core.take_outputs():
            encode(outputs)
        told = time.perf_counter()
        after = core.stats()
        assert (after.num_running, after.num_waiting) == (0, 0)
        assert after.num_free_blocks == core.limits.num_kv_blocks
        aborting.append(1e3 * (aborted - since))
        telling.append(1e3 * (told - aborted))
    for what, times in (("abort", sorted(aborting)), ("tell", sorted(telling))):
        print(f"{what}: best {times[0]:.1f} ms, median {times[len(times) // 2]:.1f} ms")


if __name__ == "__main__":
    app()
