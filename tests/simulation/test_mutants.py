"""The simulation can fail: each of these one-line mistakes is noticed within a thousand schedules,
and most within a few."""

from typing import Any

import pytest

from footplate.backend import admission as admission_module
from footplate.backend import deadlines as deadlines_module
from footplate.backend import engine_core as engine_core_module
from footplate.backend import prefix_cache as prefix_cache_module
from footplate.backend import scheduler as scheduler_module
from footplate.backend.admission import Admission
from footplate.backend.backlog import Backlog
from footplate.backend.block_pool import BlockPool
from footplate.backend.delivery import Delivery
from footplate.backend.engine_core import EngineCore
from footplate.backend.live_requests import LiveRequests
from footplate.backend.prefix_cache import PrefixCache
from footplate.backend.prompt_reading import PromptReading
from footplate.backend.repetition import RepetitionDetector
from footplate.backend.scheduler import Scheduler
from footplate.backend.siblings import Siblings
from footplate.backend.telling import Telling
from footplate.backend.waiting_queue import WaitingQueue

from .checking_runner import BrokenPlan
from .mutation import Mutant
from .simulation import Simulation

NUM_SCHEDULES = 1000

MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "sharing does not count": (BlockPool, "share", "self._num_holders[block] += 1", "pass"),
    "a block is named after its neighbour": (
        PrefixCache,
        "register",
        "request.block_ids[index]",
        "request.block_ids[index - 1]",
    ),
    "blocks are named before they are computed": (
        Scheduler,
        "_count_computed",
        "request.num_computed_tokens // block_size",
        "len(request.token_ids) // block_size",
    ),
    "a block handed out keeps its name": (
        BlockPool,
        "_take_oldest",
        "self._content.pop(block, None)",
        "None",
    ),
    "the hash leaves out the salt": (
        prefix_cache_module,
        "root_hash",
        " + cache_salt.encode()",
        "",
    ),
    "the hash leaves out the prefix": (prefix_cache_module, "prefix_hash", "parent + ", ""),
    "the whole prompt is taken from the cache": (
        PrefixCache,
        "_num_readable_blocks",
        "len(request.token_ids) - 1",
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
        "max(1, budget)",
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
        "hold",
        "request.params.max_tokens",
        "request.params.max_tokens + 1",
    ),
    "outputs are handed out twice": (
        Delivery,
        "take",
        "taken, self._columns = self._columns, {}",
        "taken = dict(self._columns)",
    ),
    "an abort is not confirmed": (
        LiveRequests,
        "tell_end",
        "self._delivery.end(request.client, request.handle, reason, message, kind)",
        "pass",
    ),
    "who leaves is still spoken to": (
        EngineCore,
        "leave",
        "self._delivery.forget(client)",
        "pass",
    ),
    "negative token ids are accepted": (Admission, "_check_ids", "min(token_ids) < 0 or ", ""),
    "a sibling shares what is not computed": (
        Siblings,
        "find_donor",
        "request.num_computed_tokens >= num_tokens",
        "True",
    ),
    "siblings share nothing": (Siblings, "find_donor", "return request", "return None"),
    "siblings do not wait for the first": (
        Siblings,
        "__init__",
        "num_shared_blocks > 0 or wants_prompt_logprobs(first)",
        "False",
    ),
    "siblings wait when the first has died": (
        Siblings,
        "replace",
        "ended is not self._first",
        "True",
    ),
    "siblings are let go only by the first's death": (
        Scheduler,
        "update",
        "self._release_siblings(pairs)",
        "pass",
    ),
    "every sibling tells the prompt's logprobs": (
        Siblings,
        "__init__",
        "request.num_scored = request.num_prompt_tokens",
        "pass",
    ),
    "an heir does not tell the prompt's logprobs": (
        Siblings,
        "replace",
        "heir.num_scored = self._num_scored",
        "pass",
    ),
    "all siblings have one seed": (admission_module, "_sibling", "first.params.seed + index", "0"),
    "siblings write to one list": (Scheduler, "_admit_first", "token_ids.copy()", "token_ids"),
    "a deadline is for running requests": (
        deadlines_module,
        "_matters",
        "is not State.FINISHED",
        "is State.RUNNING",
    ),
    "the first token's deadline is for all tokens": (
        deadlines_module,
        "_matters",
        " and not (until_first and request.num_output_tokens)",
        "",
    ),
    "a deadline counts from now": (engine_core_module, "make_requests", " - message.age_s", ""),
    "who has been idle has saved up its share": (
        WaitingQueue,
        "_lift",
        "max(line.num_served, min(waiting, default=self._last.num_served))",
        "line.num_served",
    ),
    "service is not counted": (WaitingQueue, "serve", "+= num_tokens", "+= 0"),
    "the prior output does not count": (
        Scheduler,
        "hold",
        "request.num_prompt_tokens + request.params.max_tokens",
        "num_tokens + request.params.max_tokens",
    ),
    "the start is told at output position 0 only": (
        Telling,
        "_tell_tokens",
        "position == request.num_prior_tokens",
        "position == 0",
    ),
    "a prior output that has ended is taken up": (
        Admission,
        "_check_prior",
        "prior[params.min_tokens :]",
        "prior[params.min_tokens + 1 :]",
    ),
    "a prompt is scored twice": (
        PromptReading,
        "count",
        "request.num_scored = max(request.num_scored, rows.position + len(rows.ranks))",
        "pass",
    ),
    "positions to score are read from the cache": (
        PrefixCache,
        "_num_readable_blocks",
        "request.num_scored < request.num_prompt_tokens",
        "False",
    ),
    "more rows are scored than there is room for": (
        PromptReading,
        "limit",
        "return min(count, self._max_scored_rows)",
        "return count",
    ),
    "a long prompt is never capped": (Scheduler, "_chunk", "and not is_alone", "and False"),
    "the rows of a failed request get a name": (
        Scheduler,
        "update",
        "for row in result.errors:",
        "self._count_computed(plan, result)\n"
        "    plan.num_new_tokens = [0] * len(plan.requests)\n"
        "    for row in result.errors:",
    ),
    "a failed request gets a token": (scheduler_module, "produced", "if result.errors", "if False"),
    "a complete grammar goes on": (Scheduler, "update", "in result.complete", "in ()"),
    "a grammar that was complete before gets a token": (
        scheduler_module,
        "produced",
        "result.errors.keys() | result.already_complete",
        "result.errors",
    ),
    "a grammar that was complete before goes on": (
        Scheduler,
        "update",
        "in result.already_complete",
        "in ()",
    ),
    "a pattern has to be said once more": (
        RepetitionDetector,
        "__init__",
        "(wanted.min_count - 1)",
        "wanted.min_count",
    ),
    "the prompt of siblings is counted for each": (
        Backlog,
        "enter",
        "self.num_tokens += num_tokens",
        "self.num_tokens += len(requests) * num_tokens",
    ),
    "who has run is still queued": (Scheduler, "_admit_first", "self.backlog.leave(request)", ""),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant(*MUTANTS[mutant]).install(monkeypatch)
    assert is_noticed()


def is_noticed() -> bool:
    for seed in range(NUM_SCHEDULES):
        try:
            Simulation(seed).run()
        except (AssertionError, BrokenPlan):
            return True
    return False
