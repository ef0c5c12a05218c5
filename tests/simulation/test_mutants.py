"""The simulation can fail: each of these one-line mistakes is noticed within a few schedules."""

import inspect
import textwrap
from typing import Any

import pytest

from footplate.backend import scheduler as scheduler_module
from footplate.backend.block_pool import BlockPool
from footplate.backend.engine_core import EngineCore
from footplate.backend.scheduler import Scheduler

from .simulation import Simulation

NUM_SCHEDULES = 300

MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "sharing does not count": (BlockPool, "share", "self._num_holders[block] += 1", "pass"),
    "a block is named after its neighbour": (
        Scheduler,
        "_register_full_blocks",
        "request.block_ids[index]",
        "request.block_ids[index - 1]",
    ),
    "blocks are named before they are computed": (
        Scheduler,
        "update",
        "request.num_computed_tokens // block_size",
        "len(request.token_ids) // block_size",
    ),
    "a block handed out keeps its name": (
        BlockPool,
        "_take_oldest",
        "self._content.pop(block, None)",
        "None",
    ),
    "the hash leaves out the salt": (scheduler_module, "root_hash", " + cache_salt.encode()", ""),
    "the hash leaves out the prefix": (scheduler_module, "prefix_hash", "parent + ", ""),
    "the whole prompt is taken from the cache": (
        Scheduler,
        "_find_cached_prefix",
        "(len(request.token_ids) - 1)",
        "len(request.token_ids)",
    ),
    "cached blocks are counted as free twice": (
        Scheduler,
        "_fits",
        " - self._pool.num_free_among(cached)",
        "",
    ),
    "preemption forgets to start again": (
        Scheduler,
        "_take_blocks_from",
        "request.num_computed_tokens = 0",
        "pass",
    ),
    "the first in rank is preempted": (
        Scheduler,
        "_grow",
        "victim = self._running.pop()",
        "victim = self._running.pop(0)",
    ),
    "urgent requests displace nobody": (
        Scheduler,
        "_admit_urgent",
        "self._preempt(self._running.pop())",
        "break",
    ),
    "a long prompt takes the whole budget": (
        Scheduler,
        "_plan_running",
        "budget - (len(running) - index - 1)",
        "budget",
    ),
    "the budget is one too large": (
        Scheduler,
        "schedule",
        "self._config.max_num_batched_tokens",
        "self._config.max_num_batched_tokens + 1",
    ),
    "the runner is not told to let go": (
        Scheduler,
        "_take_blocks_from",
        "self._released.append(request.key)",
        "pass",
    ),
    "a finished request keeps its blocks": (
        Scheduler,
        "_end",
        "self._take_blocks_from(request)",
        "pass",
    ),
    "one token too many": (
        Scheduler,
        "_reason_to_stop",
        "num_output_tokens >= params",
        "num_output_tokens > params",
    ),
    "outputs are handed out twice": (
        EngineCore,
        "take_outputs",
        "taken, self._columns = self._columns, {}",
        "taken = dict(self._columns)",
    ),
    "an abort is not confirmed": (
        EngineCore,
        "handle",
        "self._tell_end(client, handle, FinishReason.ABORT)",
        "pass",
    ),
    "who leaves is still spoken to": (
        EngineCore,
        "leave",
        "self._columns.pop(client, None)",
        "pass",
    ),
    "negative token ids are accepted": (EngineCore, "_why_invalid", "min(prompt) < 0 or ", ""),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, old, new = MUTANTS[mutant]
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, "the code has changed: change the mutant with it"
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), function.__globals__, namespace)
    monkeypatch.setattr(owner, name, namespace[name])
    assert is_noticed()


def is_noticed() -> bool:
    for seed in range(NUM_SCHEDULES):
        try:
            Simulation(seed).run()
        except AssertionError:
            return True
    return False
