"""The world can fail: each of these one-line mistakes, in what survives a core's death and in what
it relies on, is noticed within some hundreds of seeds, and most within a few."""

import pytest

from footplate.backend import awaited_grammars
from footplate.backend import engine_core as engine_core_module
from footplate.backend.admission import Admission
from footplate.backend.block_pool import BlockPool
from footplate.backend.scheduler import Scheduler
from footplate.frontend import engine_client as engine_client_module
from footplate.frontend import replay as replay_module
from footplate.frontend.completion import Completion
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.logprobs import ScoredTokens
from footplate.frontend.quarantine import Quarantine
from footplate.frontend.recovery import Recovery
from footplate.frontend.restart_budget import RestartBudget
from footplate.frontend.watchdog import Watchdog

from .checking_runner import BrokenPlan
from .mutation import Mutant
from .recovering_session import RecoveringSession
from .world import World

NUM_WORLDS = 500

MUTANTS = {
    # ---- how a stream goes on
    "the clock starts again": Mutant(
        engine_client_module, "continuation", "max(0.0, now - stream.metrics.arrival)", "0.0"
    ),
    "who has ended is sent again": Mutant(
        engine_client_module, "continuation", "if not completion.is_finished", "if True"
    ),
    "siblings that have begun are sent as they were": Mutant(
        engine_client_module,
        "continuation",
        "not any(_has_begun(c, sent) for c in live)",
        "True",
    ),
    "siblings go on with one seed": Mutant(
        replay_module, "_go_on", "sent.params.seed + completion.index", "sent.params.seed"
    ),
    "the output so far is forgotten": Mutant(
        replay_module, "_go_on", "completion.copy_token_ids()", "[]"
    ),
    "what goes on has its limits in the queue": Mutant(
        Admission, "check", "if not message.is_replay", "if True"
    ),
    "who goes on says nothing of it": Mutant(
        replay_module, "_go_on", "is_replay=True", "is_replay=False"
    ),
    # ---- the engine client
    "what has come before is taken again": Mutant(
        EngineClient, "handle", "position != completion.num_tokens", "False"
    ),
    "what has come before is a gap": Mutant(
        EngineClient, "_on_wrong_position", "position >= completion.num_tokens", "True"
    ),
    "who starts twice waits twice": Mutant(
        EngineClient, "_start", "if completion.is_waiting:", "if True:"
    ),
    "who leaves still waits": Mutant(
        EngineClient,
        "_forget_completion",
        "self.waiting.leave(1, stream.num_queued_tokens)",
        "pass",
    ),
    "a finished stream is still live": Mutant(
        EngineClient, "_finish", "elif stream.is_finished:", "elif False:"
    ),
    "siblings of a failure go on": Mutant(
        EngineClient, "_finish", "over += self._forget(stream)", "self._forget(stream)"
    ),
    "a stop string is kept from the core": Mutant(
        EngineClient, "_close", "over.append(completion.handle)", "pass"
    ),
    "an abort is kept from the core": Mutant(
        EngineClient, "abort", "handles += self._forget(stream)", "self._forget(stream)"
    ),
    "scores are taken twice": Mutant(
        ScoredTokens, "add", "range(num_known, len(rows.ranks))", "range(len(rows.ranks))"
    ),
    "a second end counts": Mutant(Completion, "end", "self._finish_reason is None", "True"),
    "deltas overlap": Mutant(
        Completion,
        "take",
        "self._num_taken, self._token_ids[self._num_taken :]",
        "0, self._token_ids",
    ),
    # ---- who is to blame
    "nobody is run alone": Mutant(
        Quarantine, "judge", "for h in handles if h not in culprits}", "for h in ()}"
    ),
    "nobody is to blame": Mutant(Quarantine, "judge", "if was_alone and self", "if False and self"),
    "who is killed from outside is a suspect": Mutant(
        Recovery, "welcome", "if welcome.has_crashed:", "if True:"
    ),
    "suspects are free when their connection is cut": Mutant(
        Recovery, "_runs_alone", "self._quarantine.runs_alone(", "(lambda *_: False)("
    ),
    # ---- what a session does
    "one death is judged twice": Mutant(
        Recovery, "welcome", "welcome.epoch != self._epoch", "True"
    ),
    "outputs of another time are taken": Mutant(
        Recovery, "accepts", "outputs.epoch == self._epoch", "True"
    ),
    "suspects who are gone are judged": Mutant(
        Recovery, "_judge", "if client.is_live(handle)]", "if True]"
    ),
    "culprits are run again": Mutant(Recovery, "_judge", "client.fail(", "(lambda *_: None)("),
    "nobody tells the core to run one alone": Mutant(
        Recovery, "welcome", "if self._runs_alone(message)", "if False"
    ),
    "a new connection is taken for one that serves": Mutant(
        RecoveringSession, "_open", "self.is_serving = False", "pass"
    ),
    # ---- the watchdog and the budget
    "a suspended machine is a silent core": Mutant(
        Watchdog, "tick", "min(now - self._last_tick, 2 * patience.beat_s)", "now - self._last_tick"
    ),
    "an answer does not end the silence": Mutant(Watchdog, "hear", "self._silent_s = 0.0", "pass"),
    "a core that makes steps is stalled": Mutant(
        Watchdog, "hear", "pong.num_steps != self._num_steps or", ""
    ),
    "a stopped core that was idle is well": Mutant(
        Watchdog, "tick", "self._is_busy or self.is_silent", "self._is_busy"
    ),
    "a hang is a stall": Mutant(Watchdog, "tick", "> patience.hung_s", "> 1000.0"),
    "a stall is a hang": Mutant(Watchdog, "tick", "> patience.hung_s", "> patience.stalled_s"),
    "one restart more than allowed": Mutant(
        RestartBudget, "spend", ">= self._max_restarts", "> self._max_restarts"
    ),
    "restarts are not counted": Mutant(
        RestartBudget, "spend", "self._restarts.append(now)", "pass"
    ),
    "restarts are never forgotten": Mutant(
        RestartBudget, "spend", "now - self._restarts[0] > self._window_s", "False"
    ),
    # ---- what all of it relies on, in the core
    "a deadline counts from now": Mutant(
        engine_core_module, "make_requests", " - message.age_s", ""
    ),
    "the prior output does not count": Mutant(
        Scheduler,
        "hold",
        "request.num_prompt_tokens + request.params.max_tokens",
        "num_tokens + request.params.max_tokens",
    ),
    "the end of what had ended is not told again": Mutant(
        Admission, "end_of_prior", "if not prior or not message.is_replay", "if True"
    ),
    "a limit comes before the end of a grammar": Mutant(
        awaited_grammars, "_is_complete", "return grammar", "return False and grammar"
    ),
    "preemption forgets to start again": Mutant(
        Scheduler, "_take_blocks_from", "request.num_computed_tokens = 0", "pass"
    ),
    "a finished request keeps its blocks": Mutant(
        Scheduler, "_end", "self._take_blocks_from(request)", "pass"
    ),
    "sharing does not count": Mutant(BlockPool, "share", "self._num_holders[block] += 1", "pass"),
    "a block handed out keeps its name": Mutant(
        BlockPool, "_take_oldest", "self._content.pop(block, None)", "None"
    ),
}


# Not noticed in so few worlds, for a reason.
SURVIVORS = {
    # Who has a token has others beside it, and is alone in a crash by chance only.
    # tests/frontend/test_quarantine.py asks for it.
    "a new token is no new beginning": Mutant(
        Quarantine,
        "runs_alone",
        "self._suspects.get(handle) == num_tokens",
        "handle in self._suspects",
    ),
    # Two requests have to be poison, and a third one to be run alone, to have its token, and to
    # lose it in the crash that the second one makes: one world in a thousand. Seen from outside, it
    # is a plain rule, and tests/frontend/test_quarantine.py asks for it.
    "who had others beside it is to blame": Mutant(
        Quarantine, "judge", "if was_alone and self", "if self"
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant].install(monkeypatch)
    assert is_noticed(is_poisonous=MUTANTS[mutant].owner in (Quarantine, Recovery))


@pytest.mark.parametrize("mutant", SURVIVORS)
def test_a_survivor_is_a_mistake_in_code_that_is_there(
    mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    SURVIVORS[mutant].install(monkeypatch)


def is_noticed(*, is_poisonous: bool) -> bool:
    for seed in range(NUM_WORLDS):
        try:
            World(seed, is_poisonous=is_poisonous).run()
        except (Exception, BrokenPlan):  # a check fails, or the code where the mistake leads it
            return True
    return False
