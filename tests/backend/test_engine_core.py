"""Plain calls on the core: what clients say, what they are told, and that everyone gets an end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.fake import FakeModelRunner, digest_prefix, next_token
from footplate.backend.step import RowError, ScoredRows, StepPlan, StepResult
from footplate.backend.step_guard import StepGuard
from footplate.protocol.bounds import MAX_N
from footplate.protocol.config import (
    CacheConfig,
    ModelConfig,
    RequestConfig,
    SchedulerConfig,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ControlReply,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    LogprobRows,
    ResetPrefixCache,
    Started,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import RepetitionDetection, TokenParams

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, ())
ALICE, BOB = b"alice", b"bob"
VOCAB_SIZE = 100
MAX_MODEL_LEN = 40
NUM_BLOCKS = 32
LENGTH, ABORT, ERROR = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
INVALID, DEADLINE = ErrorKind.INVALID, FinishReason.DEADLINE


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Driver:
    """A core over the fake model, and all that its clients have been told so far."""

    def __init__(
        self,
        folder: Path,
        *,
        caching: bool = True,
        supports_caching: bool = True,
        requests: RequestConfig = RequestConfig(),  # noqa: B008 (frozen)
        has_suspects: bool = True,
        **scheduler: Any,
    ) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
        cache = CacheConfig(
            block_size=4, num_gpu_blocks_override=NUM_BLOCKS, enable_prefix_caching=caching
        )
        model = ModelConfig(model="fake", max_model_len=MAX_MODEL_LEN)
        self.runner = FakeModelRunner(model, cache, folder)
        self.runner.facts = replace(self.runner.facts, supports_prefix_caching=supports_caching)
        self.clock = Clock()
        self.core = EngineCore(
            self.runner,
            cache,
            SchedulerConfig(**scheduler),
            77,
            self.clock,
            requests,
            has_suspects=has_suspects,
        )
        self.outputs: list[tuple[bytes, StepOutputs]] = []
        for client in (ALICE, BOB):
            self.core.join(client)

    def add(self, client: bytes, handle: int, prompt: list[int], **params: Any) -> None:
        fields = AddRequest.__struct_fields__
        options = {k: params.pop(k) for k in fields if k in params}
        self.core.handle(
            client,
            AddRequest(handle, prompt, msgspec.structs.replace(PARAMS, **params), **options),
        )

    def step(self) -> list[tuple[bytes, StepOutputs]]:
        self.core.step()
        self.core.check_ledger()
        outputs = self.core.take_outputs()
        self.outputs += outputs
        return outputs

    def run(self) -> None:
        for _ in range(1000):
            if not (self.core.has_work or self.core.is_drained):
                return
            self.step()
        raise AssertionError("no end in sight")

    def tokens(self, client: bytes, handle: int) -> list[int]:
        """The stream as the client has it; positions must be contiguous."""
        tokens: list[int] = []
        for owner, out in self.outputs:
            columns = zip(out.handles, out.positions, out.token_ids, strict=True)
            for one, position, token in columns:
                if (owner, one) == (client, handle):
                    assert position == len(tokens)
                    tokens.append(token)
        return tokens

    def ends(self, client: bytes, handle: int) -> list[Finished]:
        return [
            finished
            for owner, out in self.outputs
            for finished in out.finished
            if (owner, finished.handle) == (client, handle)
        ]

    def started(self, client: bytes, handle: int) -> list[Started]:
        return [
            started
            for owner, out in self.outputs
            for started in out.started
            if (owner, started.handle) == (client, handle)
        ]

    def stats(self) -> Stats:
        reply = self.core.handle(ALICE, GetStats(1))
        assert reply is not None and reply.stats is not None
        return reply.stats


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def expected(prompt: list[int], count: int, params: TokenParams = PARAMS) -> list[int]:
    tokens = list(prompt)
    for position in range(count):
        tokens.append(next_token(digest_prefix(tokens), position, params, VOCAB_SIZE, 16))
    return tokens[len(prompt) :]


# ---- a request's life


def test_a_request_streams_its_tokens_and_ends_once(driver: Driver) -> None:
    driver.add(ALICE, 5, [1, 2, 3])
    driver.run()
    assert driver.tokens(ALICE, 5) == expected([1, 2, 3], 3)
    assert driver.ends(ALICE, 5) == [Finished(5, LENGTH)]


def test_one_step_is_one_message_per_client_in_columns(driver: Driver) -> None:
    for handle in (8, 3):
        driver.add(ALICE, handle, [handle])
    driver.add(BOB, 3, [9])
    (alice, first), (bob, second) = driver.step()
    assert (alice, bob) == (ALICE, BOB)
    assert (first.epoch, first.handles, first.positions, first.counts) == (77, [8, 3], [0, 0], [])
    assert first.token_ids == expected([8], 1) + expected([3], 1)
    assert [started.handle for started in first.started] == [8, 3]
    assert (second.handles, second.token_ids) == ([3], expected([9], 1))
    driver.step()
    (_, last), _ = driver.step()
    assert last.positions == [2, 2]
    assert last.finished == [Finished(8, LENGTH), Finished(3, LENGTH)]


def test_each_output_is_handed_out_once(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    assert driver.step()
    assert driver.core.take_outputs() == []


def test_a_step_without_a_sampled_token_tells_nobody_anything(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=2, max_num_batched_tokens=4)
    driver.add(ALICE, 1, [1] * 9)
    assert driver.step() == driver.step() == []
    assert driver.step() != []


def test_started_is_told_once_with_times_and_cached_tokens(driver: Driver) -> None:
    driver.add(ALICE, 1, [7] * 9)
    driver.clock.now += 2
    driver.run()
    driver.add(ALICE, 2, [7] * 9)
    driver.clock.now += 5
    driver.run()
    assert driver.started(ALICE, 1) == [Started(1, 0, 2.0, 0.0)]
    assert driver.started(ALICE, 2) == [Started(2, 8, 5.0, 0.0)]


def test_prefill_time_runs_until_the_first_token(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=2, max_num_batched_tokens=4)
    driver.add(ALICE, 1, [7] * 9)
    while not driver.outputs:
        driver.step()
        driver.clock.now += 3
    assert driver.started(ALICE, 1) == [Started(1, 0, 0.0, 6.0)]


def test_started_is_not_told_again_after_preemption(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=1, policy="priority")
    driver.add(ALICE, 1, [1], priority=5)
    driver.step()
    driver.add(BOB, 1, [2], priority=1)
    driver.run()
    assert driver.stats().num_preemptions == 1
    assert len(driver.started(ALICE, 1)) == 1
    assert driver.tokens(ALICE, 1) == expected([1], 3)


def test_the_core_leaves_the_message_as_it_was(driver: Driver) -> None:
    message = AddRequest(1, [1, 2, 3], PARAMS)
    driver.core.handle(ALICE, message)
    driver.run()
    assert message == AddRequest(1, [1, 2, 3], PARAMS)


def test_a_handle_is_free_again_when_its_request_has_ended(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.run()
    driver.outputs.clear()
    driver.add(ALICE, 1, [2])
    driver.run()
    assert driver.tokens(ALICE, 1) == expected([2], 3)
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]


# ---- what cannot be served


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "the prompt has 0 tokens, must be 1 to 39"),
        ([1] * MAX_MODEL_LEN, "the prompt has 40 tokens, must be 1 to 39"),
        ([1, -1, 1], "token ids must be 0 to 99"),
        ([1, VOCAB_SIZE, 1], "token ids must be 0 to 99"),
        ([2**63], "token ids must be 0 to 99"),
    ],
)
def test_an_invalid_prompt_is_one_error_and_nothing_else(
    driver: Driver, prompt: list[int], problem: str
) -> None:
    driver.add(ALICE, 1, prompt)
    driver.add(ALICE, 2, [1])
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ERROR, problem, INVALID)]
    assert driver.tokens(ALICE, 1) == []
    assert driver.tokens(ALICE, 2) == expected([1], 3)
    assert driver.stats().num_prompt_tokens == 1


@pytest.mark.parametrize("prompt", [[1] * (MAX_MODEL_LEN - 1), [0, VOCAB_SIZE - 1]])
def test_a_prompt_at_the_limit_is_served(driver: Driver, prompt: list[int]) -> None:
    driver.add(ALICE, 1, prompt)
    driver.run()
    count = min(3, MAX_MODEL_LEN - len(prompt))
    assert driver.tokens(ALICE, 1) == expected(prompt, count)
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]


def test_a_handle_in_use_is_refused_and_its_request_goes_on(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.step()
    driver.add(ALICE, 1, [2])
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]  # and no other end before it
    assert driver.tokens(ALICE, 1) == expected([1], 3)


def test_an_error_is_told_by_the_next_step_even_when_there_is_nothing_to_compute(
    driver: Driver,
) -> None:
    assert not driver.core.has_work
    driver.add(ALICE, 1, [])
    assert driver.core.has_work
    [(client, outputs)] = driver.step()
    assert (client, len(outputs.finished)) == (ALICE, 1)
    assert not driver.core.has_work


# ---- n > 1


def seeded(seed: int) -> TokenParams:
    return msgspec.structs.replace(PARAMS, temperature=1.0, seed=seed)


def test_each_of_n_is_the_request_alone_with_its_seed(driver: Driver) -> None:
    driver.add(ALICE, 5, [7] * 9, n=3, temperature=1.0, seed=40)
    driver.run()
    for index in range(3):
        assert driver.tokens(ALICE, 5 + index) == expected([7] * 9, 3, seeded(40 + index))
        assert driver.ends(ALICE, 5 + index) == [Finished(5 + index, LENGTH)]
    assert [driver.started(ALICE, h)[0].num_cached_tokens for h in (5, 6, 7)] == [0, 8, 8]


def test_children_count_as_waiting_and_can_be_aborted_in_any_order(driver: Driver) -> None:
    driver.add(ALICE, 1, [7] * 9, n=4)
    assert driver.stats().num_waiting == 4
    driver.core.handle(ALICE, AbortRequests([3, 1]))
    driver.run()
    assert [driver.ends(ALICE, h)[0].reason for h in (1, 2, 3, 4)] == [ABORT, LENGTH] * 2
    assert driver.tokens(ALICE, 2) == driver.tokens(ALICE, 4) == expected([7] * 9, 3)


def test_a_handle_in_use_refuses_all_of_n_and_only_new_ones_are_told(driver: Driver) -> None:
    driver.add(ALICE, 2, [1])
    driver.add(ALICE, 1, [2], n=3)
    driver.run()
    refusal = "handle 2 is in use"
    assert driver.ends(ALICE, 1) == [Finished(1, ERROR, refusal, INVALID)]
    assert driver.ends(ALICE, 2) == [Finished(2, LENGTH)]
    assert driver.ends(ALICE, 3) == [Finished(3, ERROR, refusal, INVALID)]


def test_the_largest_n_costs_little_before_it_runs(driver: Driver) -> None:
    driver.add(ALICE, 0, [7] * 30, n=MAX_N)
    requests = list(driver.core._live)
    assert len(requests) == MAX_N
    assert len({id(request.token_ids) for request in requests}) == 1
    driver.step()
    driver.core.leave(ALICE)
    assert driver.core.stats().num_free_blocks == NUM_BLOCKS


# ---- prior output


def test_a_replayed_request_goes_on_where_it_was(driver: Driver) -> None:
    whole = expected([7, 8], 6)
    driver.add(ALICE, 1, [7, 8], prior_token_ids=whole[:2], max_tokens=6)
    driver.step()
    [(_, outputs)] = driver.outputs
    assert (outputs.positions, outputs.token_ids) == ([2], whole[2:3])
    driver.run()
    told = [(p, t) for _, o in driver.outputs for p, t in zip(o.positions, o.token_ids)]  # noqa: B905
    assert told == list(enumerate(whole))[2:]
    assert len(driver.started(ALICE, 1)) == 1
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]


# ---- deadlines


def test_a_deadline_ends_waiting_and_running_requests(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=1)
    driver.add(ALICE, 1, [1], deadline_s=5.0, max_tokens=30)
    driver.add(ALICE, 2, [2], deadline_s=5.0)
    driver.add(ALICE, 3, [3], n=2)
    driver.step()
    driver.clock.now += 4.9
    driver.step()
    assert not driver.ends(ALICE, 1)
    driver.clock.now += 0.1
    driver.step()
    assert driver.ends(ALICE, 1) == [Finished(1, DEADLINE)]
    assert driver.ends(ALICE, 2) == [Finished(2, DEADLINE)]
    assert driver.tokens(ALICE, 1) == expected([1], 2)
    driver.run()
    assert driver.ends(ALICE, 3) == [Finished(3, LENGTH)]


def test_a_deadline_ends_children_that_are_held(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=2, max_num_batched_tokens=4)
    driver.add(ALICE, 1, [1] * 9, n=3, ttft_deadline_s=5.0)
    driver.step()
    driver.clock.now += 5
    driver.step()
    assert [driver.ends(ALICE, h) for h in (1, 2, 3)] == [
        [Finished(h, DEADLINE)] for h in (1, 2, 3)
    ]
    assert not driver.stats().num_waiting


def test_the_first_tokens_deadline_is_met_by_the_first_token(driver: Driver) -> None:
    driver.add(ALICE, 1, [1], ttft_deadline_s=5.0)
    driver.step()
    driver.clock.now += 100
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]


def test_deadlines_count_from_an_arrival_before_this_core(driver: Driver) -> None:
    driver.add(ALICE, 1, [1], age_s=3.0, deadline_s=3.0)
    driver.add(ALICE, 2, [1], age_s=2.0, deadline_s=3.0)
    assert driver.core.seconds_to_deadline == 0.0
    driver.step()
    assert driver.ends(ALICE, 1) == [Finished(1, DEADLINE)]
    assert driver.core.seconds_to_deadline == 1.0
    driver.run()
    assert driver.core.seconds_to_deadline is None


# ---- queue limits


def test_more_than_may_be_queued_is_an_overflow_until_a_step_makes_room(tmp_path: Path) -> None:
    limits = RequestConfig(max_num_queued_reqs=2, max_num_queued_tokens=10)
    driver = Driver(tmp_path, requests=limits)
    driver.add(ALICE, 1, [1] * 5)
    driver.add(BOB, 1, [1] * 6)  # the limit is the engine's, not a client's
    driver.add(ALICE, 2, [1] * 5, n=2)
    driver.step()
    driver.add(ALICE, 3, [1] * 5, n=2)
    driver.run()
    assert driver.ends(BOB, 1) == [
        Finished(
            1,
            ERROR,
            "5 are queued and 6 more would exceed max_num_queued_tokens, which is 10",
            ErrorKind.OVERFLOW,
        )
    ]
    refusal = "1 are queued and 2 more would exceed max_num_queued_reqs, which is 2"
    for handle in (2, 3):
        assert len(driver.ends(ALICE, handle)) == 1 + (handle == 3)
        assert driver.ends(ALICE, handle)[0].message == refusal
    assert driver.ends(ALICE, 4) == [Finished(4, LENGTH)]


def test_who_has_waited_in_another_core_is_let_in_beyond_the_limits(tmp_path: Path) -> None:
    limits = RequestConfig(max_num_queued_reqs=1, max_num_queued_tokens=5)
    driver = Driver(tmp_path, requests=limits)
    for handle in range(3):
        driver.add(ALICE, handle, [1] * 5, is_replay=True)
    driver.add(ALICE, 3, [1])
    driver.run()
    assert [driver.ends(ALICE, handle)[0].reason for handle in range(4)] == [LENGTH] * 3 + [ERROR]


# ---- what a runner tells


class Scripted:
    """A runner whose results are given."""

    def __init__(self, driver: Driver, results: list[StepResult]) -> None:
        self.facts = driver.runner.facts
        self.results = results
        self.plans: list[StepPlan] = []
        driver.core._guard = StepGuard(self)

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return self.results.pop(0) if plan.requests else StepResult()


def test_an_error_is_told_with_kind_and_message_and_no_token(driver: Driver) -> None:
    error = RowError(ErrorKind.LOGITS, "the logits are NaN")
    Scripted(driver, [StepResult([20, 21], errors={0: error}), StepResult([22])])
    driver.add(ALICE, 1, [1])
    driver.add(ALICE, 2, [2], max_tokens=2)
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ERROR, "the logits are NaN", ErrorKind.LOGITS)]
    assert (driver.tokens(ALICE, 1), driver.started(ALICE, 1)) == ([], [])
    assert driver.tokens(ALICE, 2) == [21, 22]
    assert driver.stats().num_generation_tokens == 2
    assert driver.stats().num_free_blocks == NUM_BLOCKS


def test_a_complete_grammar_is_a_stop(driver: Driver) -> None:
    Scripted(driver, [StepResult([20], complete={0})])
    driver.add(ALICE, 1, [1])
    driver.run()
    assert driver.tokens(ALICE, 1) == [20]
    assert driver.ends(ALICE, 1) == [Finished(1, FinishReason.STOP)]


def test_a_repetitive_output_is_told_as_such(driver: Driver) -> None:
    Scripted(driver, [StepResult([20]), StepResult([20])])
    driver.add(ALICE, 1, [1], repetition=RepetitionDetection(1, 1, 2), max_tokens=9)
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, FinishReason.REPETITION)]


def test_logprobs_are_told_at_output_positions_and_of_prompts_as_they_come(driver: Driver) -> None:
    first, second, prompt = (
        ScoredRows(position, [1], bytes([position] * 4), bytes(4)) for position in (0, 0, 1)
    )
    Scripted(
        driver,
        [
            StepResult([20, 21], logprobs={1: first}, prompt_logprobs={1: prompt}),
            StepResult(
                [22, 23], errors={0: RowError(ErrorKind.LOGITS, "NaN")}, logprobs={1: second}
            ),
        ],
    )
    driver.add(ALICE, 1, [1, 2])
    driver.add(ALICE, 2, [2, 3], max_tokens=2)
    driver.run()
    told = [outputs for _, outputs in driver.outputs]
    assert [o.prompt_logprobs for o in told] == [
        [LogprobRows(2, 1, [1], b"\1" * 4, bytes(4))],
        [],
    ]
    assert [[(r.handle, r.position) for r in o.logprobs] for o in told] == [[(2, 0)], [(2, 1)]]


# ---- requests that are run again


def test_a_replay_whose_output_had_ended_gets_its_end_and_no_token(driver: Driver) -> None:
    driver.add(ALICE, 1, [1], prior_token_ids=[5, 9], stop_token_ids=(9,), is_replay=True)
    driver.add(ALICE, 2, [1], prior_token_ids=[5, 6, 7], is_replay=True, n=2)
    assert driver.core.has_work, "there is something to tell"
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, FinishReason.STOP)]
    assert driver.ends(ALICE, 2) + driver.ends(ALICE, 3) == [
        Finished(2, LENGTH),
        Finished(3, LENGTH),
    ]
    assert not any(outputs.handles or outputs.started for _, outputs in driver.outputs)
    driver.add(ALICE, 1, [1])
    driver.run()
    assert len(driver.tokens(ALICE, 1)) == 3, "its handle is free"


def test_a_full_queue_takes_in_replays(tmp_path: Path) -> None:
    driver = Driver(tmp_path, requests=RequestConfig(max_num_queued_reqs=1), max_num_seqs=1)
    driver.add(ALICE, 1, [1])
    driver.add(ALICE, 2, [2])
    driver.add(ALICE, 3, [3], is_replay=True)
    driver.run()
    [end] = driver.ends(ALICE, 2)
    assert end.kind is ErrorKind.OVERFLOW
    assert driver.ends(ALICE, 3) == [Finished(3, LENGTH)]


def test_a_request_that_runs_alone_gets_the_same_tokens(driver: Driver, tmp_path: Path) -> None:
    for handle in range(1, 5):
        driver.add(ALICE, handle, [handle, 7], run_alone=handle % 2 == 0, max_tokens=6)
    driver.run()
    for handle in range(1, 5):
        tokens = [handle, 7]
        for position in range(6):
            tokens.append(next_token(digest_prefix(tokens), position, PARAMS, VOCAB_SIZE, 16))
        assert driver.tokens(ALICE, handle) == tokens[2:]


@pytest.mark.parametrize("has_suspects", [True, False])
def test_nobody_is_run_alone_where_nothing_has_crashed(tmp_path: Path, has_suspects: bool) -> None:
    driver = Driver(tmp_path, has_suspects=has_suspects, max_num_batched_tokens=4, max_num_seqs=4)
    driver.add(ALICE, 1, [1], max_tokens=30)
    driver.step()
    driver.add(BOB, 1, [2] * 20, run_alone=True)
    for _ in range(3):
        driver.step()
    assert len(driver.tokens(ALICE, 1)) == (1 if has_suspects else 4)


def test_who_waits_for_one_that_runs_alone_still_has_a_deadline(driver: Driver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=30, deadline_s=5.0)
    driver.step()
    driver.add(ALICE, 2, [2] * 20, run_alone=True)
    driver.clock.now += 6.0
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, DEADLINE)]
    assert driver.ends(ALICE, 2) == [Finished(2, LENGTH)]


def test_a_lone_request_that_is_overdue_lets_others_go_on(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_batched_tokens=4, max_num_seqs=4)
    driver.add(ALICE, 1, [1], max_tokens=5)
    driver.step()
    driver.add(ALICE, 2, [2] * 20, run_alone=True, deadline_s=5.0)
    driver.step()
    assert len(driver.tokens(ALICE, 1)) == 1
    driver.clock.now += 6.0
    driver.run()
    assert driver.ends(ALICE, 2) == [Finished(2, DEADLINE)]
    assert len(driver.tokens(ALICE, 1)) == 5


def test_corrupted_requests_are_counted(driver: Driver) -> None:
    nan = RowError(ErrorKind.LOGITS, "NaN", is_corrupted=True)
    impossible = RowError(ErrorKind.LOGITS, "no token is possible")
    Scripted(driver, [StepResult([20, 21], errors={0: nan, 1: impossible})])
    driver.add(ALICE, 1, [1])
    driver.add(ALICE, 2, [2])
    driver.run()
    assert driver.stats().num_corrupted_requests == 1


# ---- aborts


def test_aborting_a_waiting_request_ends_it(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=1)
    driver.add(ALICE, 1, [1])
    driver.add(ALICE, 2, [2])
    driver.step()
    driver.core.handle(ALICE, AbortRequests([2]))
    driver.run()
    assert driver.ends(ALICE, 2) == [Finished(2, ABORT)]
    assert driver.tokens(ALICE, 2) == []
    assert driver.tokens(ALICE, 1) == expected([1], 3)


def test_aborting_a_running_request_ends_it_and_frees_its_blocks(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.step()
    driver.core.handle(ALICE, AbortRequests([1]))
    assert driver.stats().num_free_blocks == NUM_BLOCKS
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ABORT)]
    assert driver.tokens(ALICE, 1) == expected([1], 1)


def test_aborting_a_preempted_request_ends_it_and_frees_nothing_twice(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=1, policy="priority")
    driver.add(ALICE, 1, [1], priority=5)
    driver.step()
    driver.add(BOB, 1, [2], priority=1)
    driver.step()
    num_free = driver.stats().num_free_blocks
    driver.core.handle(ALICE, AbortRequests([1]))
    assert driver.stats().num_free_blocks == num_free
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ABORT)]


def test_aborting_unknown_finished_and_repeated_handles_is_no_error(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.run()
    driver.add(ALICE, 2, [2])
    driver.core.handle(ALICE, AbortRequests([1, 2, 2, 3, -4, 2**63]))
    driver.core.handle(ALICE, AbortRequests([]))
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, LENGTH)]
    assert driver.ends(ALICE, 2) == [Finished(2, ABORT)]
    assert {finished.handle for _, out in driver.outputs for finished in out.finished} == {1, 2}


def test_ten_thousand_requests_aborted_at_once_all_end(driver: Driver) -> None:
    for handle in range(10_000):
        driver.add(ALICE, handle, [1, 2])
    driver.step()
    driver.core.handle(ALICE, AbortRequests(list(range(10_000))))
    [(_, outputs)] = driver.step()
    assert sorted(f.handle for f in outputs.finished) == list(range(10_000))
    assert {f.reason for f in outputs.finished} == {ABORT}
    assert driver.stats().num_free_blocks == NUM_BLOCKS
    assert not driver.core.has_work


# ---- clients


def test_two_clients_may_use_the_same_handles(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.add(BOB, 1, [2], max_tokens=5)
    driver.step()
    driver.core.handle(ALICE, AbortRequests([1]))
    driver.run()
    assert driver.ends(ALICE, 1) == [Finished(1, ABORT)]
    assert driver.tokens(BOB, 1) == expected([2], 5)
    assert driver.ends(BOB, 1) == [Finished(1, LENGTH)]


def test_a_client_that_leaves_frees_all_it_held_and_is_told_nothing_more(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=2)
    for handle in range(4):  # two run, two wait
        driver.add(ALICE, handle, [handle] * 5)
    driver.add(ALICE, 4, [])
    driver.core.step()
    driver.core.leave(ALICE)
    driver.core.check_ledger()
    assert driver.core.take_outputs() == []
    stats = driver.core.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == NUM_BLOCKS
    driver.run()
    assert driver.outputs == []


def test_a_client_that_leaves_takes_nobody_along(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.add(BOB, 1, [2])
    driver.step()
    driver.core.leave(ALICE)
    driver.run()
    assert driver.tokens(BOB, 1) == expected([2], 3)


def test_messages_of_a_client_that_left_are_dropped(driver: Driver) -> None:
    driver.core.leave(ALICE)
    driver.core.leave(ALICE)
    driver.core.leave(b"never seen")
    driver.add(ALICE, 1, [1])
    driver.add(ALICE, 2, [])
    driver.core.handle(ALICE, AbortRequests([1]))
    assert driver.core.handle(ALICE, GetStats(1)) is None
    assert driver.core.handle(b"never seen", ResetPrefixCache(1)) is None
    assert not driver.core.has_work


def test_a_client_may_come_back_and_starts_with_nothing(driver: Driver) -> None:
    driver.add(ALICE, 1, [1])
    driver.step()
    driver.core.leave(ALICE)
    driver.core.join(ALICE)
    driver.outputs.clear()
    driver.add(ALICE, 1, [2])
    driver.run()
    assert driver.tokens(ALICE, 1) == expected([2], 3)


def test_joining_twice_is_a_bug(driver: Driver) -> None:
    with pytest.raises(AssertionError):
        driver.core.join(ALICE)


# ---- the runner


def test_the_runner_hears_of_finished_requests_before_the_core_goes_idle(driver: Driver) -> None:
    driver.add(ALICE, 1, [1], max_tokens=1)
    driver.step()
    assert driver.runner._digests
    driver.run()
    assert not driver.runner._digests


def test_an_idle_step_computes_nothing_and_is_not_counted(driver: Driver) -> None:
    assert not driver.core.has_work
    assert driver.step() == []
    assert driver.stats().num_steps == 0


@pytest.mark.parametrize(
    ("caching", "supports_caching"), [(True, True), (True, False), (False, True)]
)
def test_prefixes_are_cached_if_wanted_and_possible(
    tmp_path: Path, caching: bool, supports_caching: bool
) -> None:
    driver = Driver(tmp_path, caching=caching, supports_caching=supports_caching)
    for handle in (1, 2):
        driver.add(ALICE, handle, [1] * 9)
        driver.run()
    is_on = caching and supports_caching
    assert driver.core.limits.enable_prefix_caching is is_on
    assert driver.started(ALICE, 2)[0].num_cached_tokens == (8 if is_on else 0)


# ---- control calls


def test_the_prefix_cache_is_reset_when_no_request_holds_blocks(driver: Driver) -> None:
    driver.add(ALICE, 1, [1] * 9)
    driver.run()
    assert driver.stats().num_cached_blocks == 2
    assert driver.core.handle(BOB, ResetPrefixCache(4)) == ControlReply(4, True)
    assert driver.stats().num_cached_blocks == 0
    driver.add(ALICE, 2, [1] * 9)
    driver.run()
    assert driver.started(ALICE, 2)[0].num_cached_tokens == 0


def test_a_reset_is_refused_while_a_request_runs(driver: Driver) -> None:
    driver.add(ALICE, 1, [1] * 9)
    driver.step()
    assert driver.core.handle(ALICE, ResetPrefixCache(4)) == ControlReply(
        4, False, "requests are running"
    )
    assert driver.stats().num_cached_blocks == 2
    driver.run()
    assert driver.core.handle(ALICE, ResetPrefixCache(5)) == ControlReply(5, True)


def test_stats_are_the_books_between_two_steps(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_num_seqs=1)
    driver.add(ALICE, 1, [1] * 9)
    driver.add(BOB, 1, [1] * 9)
    assert driver.stats() == Stats(
        num_running=0,
        num_waiting=2,
        num_free_blocks=NUM_BLOCKS,
        num_cached_blocks=0,
        num_steps=0,
        num_preemptions=0,
        num_prompt_tokens=18,
        num_generation_tokens=0,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        num_bad_messages=0,
    )
    for _ in range(4):
        driver.step()
    assert driver.core.stats(num_bad_messages=6) == Stats(
        num_running=1,
        num_waiting=0,
        num_free_blocks=NUM_BLOCKS - 3,
        num_cached_blocks=2,
        num_steps=4,
        num_preemptions=0,
        num_prompt_tokens=18,
        num_generation_tokens=4,
        prefix_cache_queries=18,
        prefix_cache_hits=8,
        num_bad_messages=6,
    )
    driver.run()
    stats = driver.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (0, 0, 6)
    assert stats.num_free_blocks == NUM_BLOCKS


def test_limits_and_facts_are_those_of_configuration_and_model(tmp_path: Path) -> None:
    core = Driver(tmp_path, max_num_seqs=5, max_num_batched_tokens=33, policy="priority").core
    limits = core.limits
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (5, 33)
    assert (limits.policy, limits.block_size, limits.num_kv_blocks) == ("priority", 4, NUM_BLOCKS)
    assert (core.model.vocab_size, core.model.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
