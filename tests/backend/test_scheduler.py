"""Plain calls on the scheduler: who runs, with how many tokens, in which blocks, and until when."""

from typing import Any, Literal

import msgspec
import pytest

from footplate.backend import prefix_cache as prefix_cache_module
from footplate.backend.block_pool import BlockPool
from footplate.backend.logits.wanted import prompt_positions
from footplate.backend.request import Request, State
from footplate.backend.scheduler import Scheduler
from footplate.backend.step import RowError, ScoredRows, StepPlan, StepResult
from footplate.protocol.config import SchedulerConfig
from footplate.protocol.messages import ErrorKind, FinishReason
from footplate.protocol.token_params import LogprobsRequest, RepetitionDetection, TokenParams

ENDLESS = TokenParams(0.0, 1.0, 0, 0.0, 0, 1_000_000, 0, ())
FIRST_OUTPUT_ID = 1000  # prompts in these tests stay below
PROMPT = list(range(1, 11))  # two full blocks and a half


class Bench:
    """A scheduler over blocks of 4 tokens, and a model that continues every prefix of length n
    with token 1000 + n."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        budget: int = 64,
        policy: Literal["fcfs", "priority"] = "fcfs",
        max_model_len: int | None = None,
        caching: bool = True,
        can_share: bool = True,
        max_scored_rows: int = 1_000,
        long_prefill_token_threshold: int = 0,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size=4)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                policy=policy,
                long_prefill_token_threshold=long_prefill_token_threshold,
            ),
            self.pool,
            max_model_len or num_blocks * 4,
            caching and can_share,
            can_share,
            max_scored_rows,
        )
        self.requests: list[Request] = []
        self.collects_chunks = False

    def add(self, prompt: int | list[int], **options: Any) -> Request:
        """Add a request with this prompt, or with one of this length that no other begins like.

        `options` are fields of the request, or of its params.
        """
        return self.add_siblings(1, prompt, **options)[0]

    def add_siblings(self, n: int, prompt: int | list[int], **options: Any) -> list[Request]:
        """Add `n` requests of one prompt."""
        key = len(self.requests) + 1
        if isinstance(prompt, int):
            prompt = [key] * prompt
        names = ("client", "priority", "cache_salt", "arrival_time", "runs_alone")
        fields = {"client": b"client"} | {k: options.pop(k) for k in names if k in options}
        tokens = prompt + options.pop("prior", [])
        params = msgspec.structs.replace(ENDLESS, **options)
        added = [
            Request(
                key=key + index,
                handle=key + index,
                token_ids=tokens,
                num_prompt_tokens=len(prompt),
                params=params,
                num_prior_tokens=len(tokens) - len(prompt),
                **fields,
            )
            for index in range(n)
        ]
        self.requests += added
        self.scheduler.hold(added)
        self.scheduler.release(added)
        return added

    def step(self, errors: dict[int, RowError] | None = None, complete: int = -1) -> StepPlan:
        """One whole step, and a look at the books.

        `errors` are by row, and `complete` is a row.
        """
        plan = self.scheduler.schedule(now=0.0)
        tokens = [FIRST_OUTPUT_ID + len(plan.requests[i].token_ids) for i in plan.sampling]
        result = StepResult(tokens, errors or {}, {complete} - {-1})
        result.prompt_logprobs = self.score(plan)
        self.finished = self.scheduler.update(plan, result)
        self.scheduler.check_ledger()
        return plan

    def score(self, plan: StepPlan) -> dict[int, ScoredRows]:
        """What a runner says of prompts, without the numbers: of chunks as they come, or of whole
        prompts at their end."""
        scored = {}
        for index, request in enumerate(plan.requests):
            end = request.num_computed_tokens + plan.num_new_tokens[index]
            start = 0 if self.collects_chunks else request.num_computed_tokens
            positions = prompt_positions(request, start, end)
            if positions and not (self.collects_chunks and index not in plan.sampling):
                scored[index] = ScoredRows(positions.start, [1] * len(positions), b"", b"")
        return scored

    def steps(self, count: int) -> list[StepPlan]:
        return [self.step() for _ in range(count)]

    def abort(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.finish(request, FinishReason.ABORT)
        self.scheduler.check_ledger()

    def run_to_the_end(self) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) < 10_000, "no end in sight"
        assert self.pool.num_free == self.pool.num_blocks
        return plans


def planned(plan: StepPlan) -> dict[int, int]:
    """Tokens per request key."""
    return {
        request.key: count
        for request, count in zip(plan.requests, plan.num_new_tokens, strict=True)
    }


def sampled(plan: StepPlan) -> list[int]:
    return [plan.requests[index].key for index in plan.sampling]


def expected_tokens(request: Request) -> list[int]:
    start = request.num_prompt_tokens
    return [FIRST_OUTPUT_ID + n for n in range(start, start + request.num_output_tokens)]


# ---- the token budget


def test_a_prompt_within_the_budget_is_computed_in_one_step() -> None:
    bench = Bench(budget=16)
    bench.add(16)
    plan = bench.step()
    assert planned(plan) == {1: 16}
    assert sampled(plan) == [1]


def test_a_prompt_beyond_the_budget_is_computed_in_chunks_and_samples_with_the_last() -> None:
    bench = Bench(budget=8)
    request = bench.add(18)
    plans = bench.steps(4)
    assert [planned(plan) for plan in plans] == [{1: 8}, {1: 8}, {1: 2}, {1: 1}]
    assert [sampled(plan) for plan in plans] == [[], [], [1], [1]]
    assert request.token_ids[18:] == [1018, 1019]


def test_a_decode_is_one_token() -> None:
    bench = Bench()
    bench.add(5)
    bench.add(6)
    bench.step()
    assert [planned(plan) for plan in bench.steps(3)] == [{1: 1, 2: 1}] * 3


def test_decodes_and_prompt_chunks_share_one_budget() -> None:
    bench = Bench(budget=8)
    bench.add(4)
    bench.step()
    bench.add(20)
    assert [planned(plan) for plan in bench.steps(4)] == [{1: 1, 2: 7}] * 2 + [
        {1: 1, 2: 6},
        {1: 1, 2: 1},
    ]


def test_what_the_first_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    bench = Bench(budget=8)
    bench.add(6)
    bench.add(6)
    bench.add(6)
    assert [planned(plan) for plan in bench.steps(3)] == [
        {1: 6, 2: 2},
        {1: 1, 2: 4, 3: 3},
        {1: 1, 2: 1, 3: 3},
    ]


def test_a_long_prompt_leaves_one_token_for_everybody_behind_it() -> None:
    bench = Bench(budget=8, policy="priority", max_num_seqs=4)
    for _ in range(3):
        bench.add(2, priority=1)
    bench.step()
    bench.add(40, priority=0)
    for plan in bench.steps(3):
        assert planned(plan) == {4: 5, 1: 1, 2: 1, 3: 1}
        assert sampled(plan) == [1, 2, 3]


@pytest.mark.parametrize("budget", [3, 4, 7, 64])
def test_no_step_is_larger_than_the_budget_and_everybody_running_is_in_it(budget: int) -> None:
    bench = Bench(budget=budget, max_num_seqs=3)
    for length in (9, 1, 30, 2, 5, 17):
        bench.add(length, max_tokens=6)
    while bench.scheduler.has_work:
        running = {r.key for r in bench.requests if r.state is State.RUNNING}
        plan = bench.step()
        assert plan.num_tokens <= budget
        assert running <= planned(plan).keys()
        assert all(count > 0 for count in plan.num_new_tokens)
    assert all(r.num_output_tokens == 6 for r in bench.requests)


def test_no_more_requests_run_than_there_are_slots() -> None:
    bench = Bench(max_num_seqs=2)
    for _ in range(3):
        bench.add(4, max_tokens=2)
    assert [list(planned(plan)) for plan in bench.steps(3)] == [[1, 2], [1, 2], [3]]


def test_the_indices_to_sample_are_ascending_and_refer_to_the_plan() -> None:
    bench = Bench(budget=8)
    bench.add(2)
    bench.add(20)
    bench.step()
    bench.add(2)
    plan = bench.step()
    assert planned(plan) == {1: 1, 2: 7}
    assert plan.sampling == [0]
    assert bench.steps(3)[-1].sampling == [0, 1, 2]


@pytest.mark.parametrize(("max_num_seqs", "budget"), [(0, 8), (8, 7), (8, 0)])
def test_a_budget_that_cannot_serve_every_slot_is_refused(max_num_seqs: int, budget: int) -> None:
    with pytest.raises(AssertionError):
        Bench(max_num_seqs=max_num_seqs, budget=budget)


def test_a_cache_too_small_for_one_request_is_refused() -> None:
    Bench(num_blocks=4, max_model_len=16)
    with pytest.raises(AssertionError, match="one request must always fit"):
        Bench(num_blocks=4, max_model_len=17)


@pytest.mark.parametrize("length", [0, 16, 17])
def test_a_prompt_that_leaves_no_room_for_a_token_is_refused(length: int) -> None:
    bench = Bench(num_blocks=4)
    with pytest.raises(AssertionError):
        bench.add(length)
    assert not bench.scheduler.has_work


# ---- order


def test_first_come_first_served_whatever_the_priorities() -> None:
    bench = Bench(max_num_seqs=1)
    for priority in (2, 0, 1):
        bench.add(4, priority=priority, max_tokens=1)
    assert [list(planned(plan)) for plan in bench.steps(3)] == [[1], [2], [3]]


def test_lower_priority_first_and_ties_by_arrival() -> None:
    bench = Bench(max_num_seqs=1, policy="priority")
    for priority in (2, 0, 1, 0, -1):
        bench.add(4, priority=priority, max_tokens=1)
    assert [list(planned(plan)) for plan in bench.steps(5)] == [[5], [2], [4], [3], [1]]


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    bench = Bench(num_blocks=4)
    bench.add(8, max_tokens=2)
    large, small = bench.add(12, max_tokens=1), bench.add(1, max_tokens=1)
    assert [list(planned(plan)) for plan in bench.steps(2)] == [[1], [1]]
    assert {large.state, small.state} == {State.WAITING}
    assert list(planned(bench.step())) == [2, 3]


def test_an_urgent_request_displaces_the_last_in_rank_for_a_slot() -> None:
    bench = Bench(max_num_seqs=2, policy="priority")
    first, second = bench.add(4, priority=5), bench.add(4, priority=5)
    bench.steps(2)
    urgent = bench.add(4, priority=1)
    plan = bench.step()
    assert planned(plan) == {3: 4, 1: 1}
    assert plan.released == [2]
    assert (first.state, second.state, urgent.state) == (
        State.RUNNING,
        State.PREEMPTED,
        State.RUNNING,
    )


def test_an_urgent_request_displaces_as_many_as_it_needs_blocks_of() -> None:
    bench = Bench(num_blocks=8, policy="priority")
    for _ in range(4):
        bench.add(5, priority=5)
    bench.step()
    urgent = bench.add(13, priority=1)
    plan = bench.step()
    assert planned(plan) == {5: 13, 1: 1, 2: 1}
    assert plan.released == [4, 3]
    assert len(urgent.block_ids) == 4


def test_a_displaced_request_resumes_with_the_tokens_it_had() -> None:
    bench = Bench(max_num_seqs=1, policy="priority", caching=False)
    displaced = bench.add(4, priority=5, max_tokens=5)
    bench.steps(3)
    bench.add(4, priority=1, max_tokens=2)
    bench.steps(2)
    assert displaced.token_ids == [1, 1, 1, 1, 1004, 1005, 1006]
    assert planned(bench.step()) == {1: 7}
    bench.run_to_the_end()
    assert displaced.token_ids[4:] == [1004, 1005, 1006, 1007, 1008]


def test_nobody_is_displaced_for_an_urgent_request_that_would_not_fit_all_the_same() -> None:
    bench = Bench(num_blocks=10, policy="priority", caching=False)
    best, worst = bench.add(21, priority=0), bench.add(5, priority=5)
    bench.step()
    urgent = bench.add(18, priority=1)  # five blocks; the best holds six of ten
    bench.step()
    assert (worst.state, urgent.state) == (State.RUNNING, State.WAITING)
    assert bench.scheduler.num_preemptions == 0
    bench.abort(best)
    bench.step()
    assert urgent.state is State.RUNNING


@pytest.mark.parametrize("priority", [5, 6])
def test_equal_and_worse_priorities_displace_nobody(priority: int) -> None:
    bench = Bench(max_num_seqs=1, policy="priority")
    bench.add(4, priority=5)
    bench.step()
    waiting = bench.add(4, priority=priority)
    bench.steps(3)
    assert waiting.state is State.WAITING
    assert bench.scheduler.num_preemptions == 0


def test_under_first_come_nobody_is_displaced() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(4, priority=5)
    bench.step()
    bench.add(4, priority=0)
    assert [list(planned(plan)) for plan in bench.steps(3)] == [[1]] * 3


def test_an_urgent_prompt_goes_before_the_rest_of_a_worse_one() -> None:
    bench = Bench(budget=8, policy="priority")
    bench.add(40, priority=5)
    bench.step()
    bench.add(10, priority=1)
    assert [planned(plan) for plan in bench.steps(3)] == [
        {2: 7, 1: 1},
        {2: 3, 1: 5},
        {2: 1, 1: 7},
    ]
    assert bench.scheduler.num_preemptions == 0


def test_several_urgent_requests_displace_in_one_step() -> None:
    bench = Bench(max_num_seqs=3, policy="priority")
    for _ in range(3):
        bench.add(4, priority=5)
    bench.step()
    for priority in (2, 1):
        bench.add(4, priority=priority)
    plan = bench.step()
    assert planned(plan) == {5: 4, 4: 4, 1: 1}
    assert plan.released == [3, 2]


# ---- preemption


def two_that_do_not_fit_together(**options: Any) -> tuple[Bench, Request, Request]:
    """After four steps the elder has filled its second block and needs a third; none is left."""
    bench = Bench(num_blocks=4, **options)
    elder, younger = bench.add(5, max_tokens=8), bench.add(5, max_tokens=8)
    bench.steps(4)
    assert bench.pool.num_free == 0
    return bench, elder, younger


def test_the_last_in_rank_is_preempted_when_blocks_run_out() -> None:
    bench, elder, younger = two_that_do_not_fit_together()
    plan = bench.step()
    assert planned(plan) == {1: 1}
    assert plan.released == [2]
    assert (elder.state, younger.state) == (State.RUNNING, State.PREEMPTED)
    assert bench.scheduler.num_preemptions == 1


def test_no_more_are_preempted_than_have_to_be() -> None:
    bench = Bench(num_blocks=6, caching=False)
    for _ in range(3):
        bench.add(5)
    bench.steps(4)
    assert bench.pool.num_free == 0
    # Two need a block each; what the third gives up is enough for both.
    plan = bench.step()
    assert planned(plan) == {1: 1, 2: 1}
    assert plan.released == [3]


def test_a_preempted_request_keeps_its_tokens_and_nothing_else() -> None:
    bench, _, younger = two_that_do_not_fit_together()
    tokens = list(younger.token_ids)
    bench.step()
    assert younger.token_ids == tokens
    assert (younger.block_ids, younger.num_computed_tokens) == ([], 0)


def test_a_preempted_request_recomputes_its_prefix() -> None:
    bench, elder, younger = two_that_do_not_fit_together(caching=False)
    bench.step()
    plans = bench.run_to_the_end()
    recomputed = next(plan for plan in plans if 2 in planned(plan))
    assert planned(recomputed)[2] == 5 + 4
    for request in (elder, younger):
        assert request.token_ids[5:] == expected_tokens(request)
        assert request.num_output_tokens == 8


def test_a_preempted_request_finds_in_the_cache_what_was_not_taken_from_it() -> None:
    bench, _, younger = two_that_do_not_fit_together()
    bench.step()
    # The elder took the youngest block: the end of a prefix goes first.
    assert planned(next(plan for plan in bench.run_to_the_end() if 2 in planned(plan)))[2] == 5
    assert younger.token_ids[5:] == expected_tokens(younger)


def test_the_last_in_rank_preempts_itself() -> None:
    bench = Bench(num_blocks=5)
    bench.add(9)
    younger = bench.add(8)
    bench.step()
    assert bench.pool.num_free == 0
    plan = bench.step()
    assert planned(plan) == {1: 1}
    assert plan.released == [2]
    assert younger.state is State.PREEMPTED


def test_a_preempted_request_comes_before_those_that_never_ran() -> None:
    bench, elder, _ = two_that_do_not_fit_together(max_num_seqs=2)
    bench.add(1, max_tokens=1)
    bench.step()
    bench.abort(elder)
    assert list(planned(bench.step())) == [2, 3]


def test_who_is_preempted_and_readmitted_at_once_stands_in_both_columns() -> None:
    bench = Bench(num_blocks=6)
    elder, twin = bench.add(PROMPT), bench.add(PROMPT)
    bench.steps(3)
    assert bench.pool.num_free == 0
    # The elder needs a fourth block. The twin computed the same tokens in blocks of its own;
    # without them it finds the elder's.
    plan = bench.step()
    assert plan.released == [2]
    assert planned(plan) == {1: 1, 2: 1}
    assert twin.block_ids[:3] == elder.block_ids[:3]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_best_ranked_request_progresses_in_every_step(
    policy: Literal["fcfs", "priority"],
) -> None:
    bench = Bench(num_blocks=6, budget=9, max_num_seqs=5, policy=policy)
    for index in range(12):
        bench.add(1 + index * 5 % 17, priority=index % 3, max_tokens=1 + index * 3 % 7)
    while live := [r for r in bench.requests if r.state is not State.FINISHED]:
        best = min(live, key=lambda r: (r.priority if policy == "priority" else 0, r.arrival))
        assert best.key in planned(bench.step())
    assert bench.scheduler.num_preemptions > 0
    assert all(r.token_ids[r.num_prompt_tokens :] == expected_tokens(r) for r in bench.requests)


# ---- the prefix cache


def test_two_requests_sharing_a_prefix_share_blocks() -> None:
    bench = Bench()
    first = bench.add(PROMPT)
    bench.step()
    second = bench.add([*PROMPT[:8], 99])
    assert planned(bench.step()) == {1: 1, 2: 1}
    assert first.block_ids[:2] == second.block_ids[:2]
    assert not set(first.block_ids[2:]) & set(second.block_ids[2:])
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert bench.pool.num_free == 64 - 4


def test_shared_blocks_stay_until_their_last_holder_has_gone() -> None:
    bench = Bench(num_blocks=8)
    first = bench.add(PROMPT)
    bench.step()
    second = bench.add(PROMPT)
    bench.step()
    bench.abort(first)
    assert bench.pool.num_free == 8 - 3
    bench.abort(second)
    assert bench.pool.num_free == 8


def test_preempting_one_holder_leaves_the_shared_blocks_to_the_other() -> None:
    bench = Bench(policy="priority", max_num_seqs=2)
    first = bench.add(PROMPT, priority=1)
    bench.step()
    second = bench.add(PROMPT, priority=1)
    bench.step()
    bench.add(4, priority=0)
    bench.step()
    assert second.state is State.PREEMPTED
    assert len(first.block_ids) == 3
    assert bench.pool.num_free == 64 - 4


def test_a_finished_prefix_is_found_again() -> None:
    bench = Bench()
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    again = bench.add(PROMPT)
    assert planned(bench.step()) == {2: 2}
    assert again.num_cached_tokens == 8


def test_produced_tokens_are_found_again_too() -> None:
    bench = Bench()
    first = bench.add(PROMPT, max_tokens=7)
    bench.run_to_the_end()
    # The last token was never computed: only 16 of the 17 are in the cache.
    follow_up = bench.add([*first.token_ids, 7, 8])
    assert planned(bench.step()) == {2: 3}
    assert follow_up.num_cached_tokens == 16


@pytest.mark.parametrize(("length", "num_cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (3, 0), (1, 0)])
def test_at_least_one_token_is_always_left_to_compute(length: int, num_cached: int) -> None:
    bench = Bench()
    bench.add(list(range(1, 13)), max_tokens=1)
    bench.step()
    again = bench.add(list(range(1, length + 1)), max_tokens=1)
    plan = bench.step()
    assert again.num_cached_tokens == num_cached
    assert planned(plan) == {2: length - num_cached}
    assert sampled(plan) == [2]


def test_a_prefix_ends_at_the_first_block_that_differs() -> None:
    bench = Bench()
    bench.add(list(range(1, 17)), max_tokens=1)
    bench.step()
    other = bench.add([*range(1, 5), 0, *range(6, 17)])
    bench.step()
    assert other.num_cached_tokens == 4


def test_a_block_behind_another_prefix_is_not_shared() -> None:
    bench = Bench()
    bench.add([1, 1, 1, 1, 5, 6, 7, 8, 9], max_tokens=1)
    bench.add([2, 2, 2, 2, 3, 3, 3, 3, 3], max_tokens=1)
    bench.step()
    other = bench.add([2, 2, 2, 2, 5, 6, 7, 8, 9])
    bench.step()
    assert other.num_cached_tokens == 4


def test_only_blocks_that_are_computed_are_shared() -> None:
    bench = Bench(budget=8)
    bench.add(list(range(1, 15)))
    bench.step()
    # The elder has computed 8 of its tokens and takes 6 in this step, the other the rest.
    second = bench.add(list(range(1, 15)))
    assert planned(bench.step()) == {1: 6, 2: 2}
    assert second.num_cached_tokens == 8


def test_two_that_compute_the_same_prefix_side_by_side_share_nothing() -> None:
    bench = Bench()
    first, second = bench.add(PROMPT, max_tokens=2), bench.add(PROMPT, max_tokens=2)
    assert planned(bench.step()) == {1: 10, 2: 10}
    assert not set(first.block_ids) & set(second.block_ids)
    third = bench.add(PROMPT, max_tokens=2)
    bench.step()
    assert third.block_ids[:2] != second.block_ids[:2]
    bench.run_to_the_end()


def test_prefixes_are_shared_only_under_equal_salts() -> None:
    bench = Bench()
    for salt in ("red", "blue", "", "red"):
        bench.add(PROMPT, cache_salt=salt, max_tokens=1)
        bench.step()
    assert [r.num_cached_tokens for r in bench.requests] == [0, 0, 0, 8]


def test_with_prefix_caching_off_nothing_is_shared() -> None:
    bench = Bench(caching=False)
    bench.add(PROMPT)
    bench.step()
    second = bench.add(PROMPT)
    assert planned(bench.step()) == {1: 1, 2: 10}
    assert second.num_cached_tokens == 0
    assert bench.pool.num_cached == 0
    assert (bench.scheduler.prefix_cache_queries, bench.scheduler.prefix_cache_hits) == (0, 0)


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache_module, "prefix_hash", lambda parent, token_ids: b"same")
    bench = Bench()
    bench.add(PROMPT[:5], max_tokens=1)
    bench.step()
    other, same = bench.add([9, 8, 7, 6, 5]), bench.add(PROMPT[:5])
    bench.step()
    assert (other.num_cached_tokens, same.num_cached_tokens) == (0, 4)
    assert other.block_ids[0] != same.block_ids[0]


def test_an_evicted_prefix_is_computed_again() -> None:
    bench = Bench(num_blocks=4)
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    bench.add(13, max_tokens=1)
    bench.step()
    again = bench.add(PROMPT)
    assert planned(bench.step()) == {3: 10}
    assert again.num_cached_tokens == 0


def test_a_cached_prefix_counts_as_free_only_once() -> None:
    bench = Bench(num_blocks=4)
    bench.add(list(range(1, 10)), max_tokens=1)
    bench.step()
    bench.add(5)
    bench.step()
    # Two blocks are free and hold the prefix; the other two are in use. Three are needed, of
    # which two are cached: taking them leaves none for the third.
    again = bench.add(list(range(1, 10)))
    assert planned(bench.step()) == {2: 1}
    assert again.state is State.WAITING


def test_hits_and_queries_count_prompt_tokens_at_first_admission() -> None:
    bench = Bench(policy="priority", max_num_seqs=1)
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    bench.add(PROMPT, priority=1)
    bench.step()
    bench.add(3, priority=0, max_tokens=1)
    bench.steps(3)
    assert bench.requests[1].state is State.RUNNING
    assert bench.scheduler.num_preemptions == 1
    assert bench.scheduler.prefix_cache_queries == 10 + 10 + 3
    assert bench.scheduler.prefix_cache_hits == 8
    assert bench.requests[1].num_cached_tokens == 8


# ---- the end


def test_max_tokens_ends_a_request() -> None:
    bench = Bench()
    request = bench.add(4, max_tokens=3)
    plans = bench.run_to_the_end()
    assert request.finish_reason is FinishReason.LENGTH
    assert request.token_ids[4:] == [1004, 1005, 1006]
    assert len(plans) == 3 + 1  # the last only tells the runner to let go


def test_a_stop_token_ends_a_request_and_is_part_of_it() -> None:
    bench = Bench()
    request = bench.add(4, stop_token_ids=(5, 1006))
    bench.run_to_the_end()
    assert request.finish_reason is FinishReason.STOP
    assert request.token_ids[4:] == [1004, 1005, 1006]


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    bench = Bench()
    request = bench.add([5, 5, 5], stop_token_ids=(5,), max_tokens=4)
    bench.run_to_the_end()
    assert request.num_output_tokens == 4


@pytest.mark.parametrize(
    ("min_tokens", "num_tokens", "reason"),
    [
        (0, 1, FinishReason.STOP),
        (1, 2, FinishReason.STOP),
        (2, 3, FinishReason.STOP),
        (3, 3, FinishReason.LENGTH),
    ],
)
def test_stop_tokens_count_only_behind_min_tokens(
    min_tokens: int, num_tokens: int, reason: FinishReason
) -> None:
    bench = Bench()
    request = bench.add(
        4, stop_token_ids=tuple(range(1004, 1010)), min_tokens=min_tokens, max_tokens=3
    )
    bench.run_to_the_end()
    assert (request.num_output_tokens, request.finish_reason) == (num_tokens, reason)


def test_a_stop_token_at_the_last_allowed_position_is_a_stop() -> None:
    bench = Bench()
    request = bench.add(4, stop_token_ids=(1005,), max_tokens=2)
    bench.run_to_the_end()
    assert request.finish_reason is FinishReason.STOP


def test_the_context_window_ends_a_request() -> None:
    bench = Bench(num_blocks=2, max_model_len=7)
    request = bench.add(4)
    bench.run_to_the_end()
    assert request.finish_reason is FinishReason.LENGTH
    assert len(request.token_ids) == 7


def test_the_longest_prompt_produces_one_token() -> None:
    bench = Bench(num_blocks=2)
    request = bench.add(7)
    bench.run_to_the_end()
    assert (request.num_output_tokens, request.finish_reason) == (1, FinishReason.LENGTH)


def test_update_says_who_finished() -> None:
    bench = Bench()
    bench.add(4, max_tokens=2)
    bench.step()
    assert bench.finished == []
    bench.step()
    assert bench.finished == bench.requests


def test_who_finishes_makes_room_in_the_next_step() -> None:
    bench = Bench(num_blocks=4)
    first = bench.add(12, max_tokens=1)
    second = bench.add(12, max_tokens=1)
    bench.step()
    assert (first.state, second.state) == (State.FINISHED, State.WAITING)
    assert list(planned(bench.step())) == [2]


# ---- ended from outside


def test_ending_a_waiting_request_frees_nothing() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(4)
    bench.step()
    waiting = bench.add(4)
    num_free = bench.pool.num_free
    bench.abort(waiting)
    assert bench.pool.num_free == num_free
    assert bench.scheduler.num_waiting == 0
    assert bench.step().released == []


def test_ending_a_running_request_frees_its_blocks_at_once() -> None:
    bench = Bench()
    request = bench.add(9)
    other = bench.add(4)
    bench.step()
    bench.abort(request)
    assert bench.pool.num_free == 64 - 1
    assert (request.state, request.finish_reason) == (State.FINISHED, FinishReason.ABORT)
    assert list(planned(bench.step())) == [other.key]


def test_ending_a_preempted_request_frees_nothing_twice() -> None:
    bench, _, younger = two_that_do_not_fit_together()
    assert bench.step().released == [2]
    num_free = bench.pool.num_free
    bench.abort(younger)
    assert bench.pool.num_free == num_free
    assert bench.step().released == []


@pytest.mark.parametrize("num_steps", [0, 1])
def test_ending_a_request_twice_is_a_bug(num_steps: int) -> None:
    bench = Bench()
    request = bench.add(4)
    bench.steps(num_steps)
    bench.abort(request)
    with pytest.raises(AssertionError, match="FINISH"):
        bench.scheduler.finish(request, FinishReason.ABORT)


def test_an_ended_head_of_the_queue_holds_up_nobody() -> None:
    bench = Bench(num_blocks=4)
    bench.add(8)
    bench.step()
    large = bench.add(12)
    small = bench.add(1)
    bench.abort(large)
    assert small.key in planned(bench.step())


def num_kept(bench: Bench) -> int:
    return len(bench.scheduler._waiting._lines[b"client"].heap)


def test_ended_requests_do_not_pile_up_in_the_queue() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(4)
    bench.step()
    for _ in range(2000):
        request = bench.add(4)
        bench.scheduler.finish(request, FinishReason.ABORT)
        assert num_kept(bench) <= 65
    waiting = [bench.add(4) for _ in range(1000)]
    for count, request in enumerate(reversed(waiting[1:]), 1):
        bench.scheduler.finish(request, FinishReason.ABORT)
        assert num_kept(bench) <= 2 * (1000 - count) + 65
    bench.scheduler.check_ledger()
    bench.abort(bench.requests[0])
    assert list(planned(bench.step())) == [waiting[0].key]


def test_the_queue_keeps_its_order_when_it_is_swept() -> None:
    bench = Bench(max_num_seqs=1)
    waiting = [bench.add(1, max_tokens=1) for _ in range(300)]
    bench.abort(*(r for i, r in enumerate(waiting) if i % 10))
    order = [key for plan in bench.run_to_the_end() for key in planned(plan)]
    assert order == [r.key for r in waiting[::10]]


# ---- what the runner is told


def test_a_finished_key_is_released_once_with_the_next_plan() -> None:
    bench = Bench()
    bench.add(4, max_tokens=1)
    assert bench.step().released == []
    assert bench.scheduler.has_work
    assert bench.step() == StepPlan(released=[1], admitted=[])
    assert not bench.scheduler.has_work
    assert bench.step() == StepPlan(admitted=[])


def test_who_is_given_blocks_is_told_with_the_plan_in_which_that_happens() -> None:
    bench = Bench(num_blocks=4)
    first = bench.add(4)
    assert bench.step().admitted == [first]
    second = bench.add(7)
    assert bench.step().admitted == [second]
    plans = bench.steps(5)
    assert {plan.admitted == [] for plan in plans} == {True}
    assert second.state is State.PREEMPTED
    bench.abort(first)
    assert bench.step().admitted == [second]


def test_an_aborted_key_is_released_once() -> None:
    bench = Bench()
    request = bench.add(4)
    bench.add(4)
    bench.step()
    bench.abort(request)
    assert [plan.released for plan in bench.steps(2)] == [[1], []]


def test_blocks_change_hands_no_earlier_than_the_runner_is_told() -> None:
    bench = Bench(num_blocks=2)
    first = bench.add(7, max_tokens=1)
    second = bench.add(7, max_tokens=1)
    plan = bench.scheduler.schedule(0.0)
    blocks = set(first.block_ids)
    bench.scheduler.update(plan, StepResult([1000]))
    plan = bench.scheduler.schedule(0.0)
    assert set(second.block_ids) == blocks
    assert plan.released == [first.key]


def test_the_time_of_first_admission_is_kept_over_preemption() -> None:
    bench = Bench(max_num_seqs=1, policy="priority")
    request = bench.add(4, priority=1)
    for now in (1.0, 2.0, 3.0):
        plan = bench.scheduler.schedule(now)
        bench.scheduler.update(plan, StepResult([1000] * len(plan.sampling)))
        if now == 1.0:
            bench.add(4, priority=0, max_tokens=1)
    assert request.state is State.RUNNING
    assert bench.scheduler.num_preemptions == 1
    assert request.scheduled_time == 1.0


# ---- held


def test_a_held_request_keeps_its_place_and_holds_up_nobody() -> None:
    bench = Bench(max_num_seqs=1)
    held = Request(99, b"client", 99, [1, 2], 2, ENDLESS)
    bench.scheduler.hold([held])
    assert not bench.scheduler.has_work
    assert bench.scheduler.num_waiting == 1
    first, second = bench.add(4, max_tokens=1), bench.add(4, max_tokens=1)
    assert list(planned(bench.step())) == [first.key]
    bench.scheduler.release([held])
    assert list(planned(bench.step())) == [held.key]
    assert second.state is State.WAITING


def test_a_request_may_end_while_it_is_held() -> None:
    bench = Bench()
    held = Request(99, b"client", 99, [1, 2], 2, ENDLESS)
    bench.scheduler.hold([held])
    bench.abort(held)
    bench.scheduler.release([held])
    assert bench.scheduler.num_waiting == bench.scheduler.backlog.num_requests == 0
    assert not bench.scheduler.has_work


# ---- siblings


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_the_prompts_full_blocks_once_it_is_computed(caching: bool) -> None:
    bench = Bench(budget=8, caching=caching)
    first, *others = bench.add_siblings(3, PROMPT)
    assert planned(bench.step()) == {1: 8}
    assert {r.state for r in others} == {State.HELD}
    assert planned(bench.step()) == {1: 2}
    assert planned(bench.step()) == {1: 1, 2: 2, 3: 2}
    for sibling in others:
        assert sibling.block_ids[:2] == first.block_ids[:2]
        assert sibling.num_cached_tokens == 8
    assert len({r.block_ids[2] for r in (first, *others)}) == 3
    bench.abort(first, *others)
    bench.run_to_the_end()


def test_siblings_that_wait_for_the_first_hold_up_nobody() -> None:
    bench = Bench(budget=8)
    bench.add_siblings(3, 20)
    other = bench.add(2)
    assert planned(bench.step()) == {1: 8}
    plan = bench.steps(2)[-1]
    assert planned(plan) == {1: 4, other.key: 2}


def test_siblings_of_a_prompt_without_a_full_block_run_at_once() -> None:
    bench = Bench()
    bench.add_siblings(3, 4)  # one block, of which the last token is everyone's own
    assert planned(bench.step()) == {1: 4, 2: 4, 3: 4}


def test_siblings_run_at_once_where_blocks_cannot_be_shared() -> None:
    bench = Bench(can_share=False)
    bench.add_siblings(3, PROMPT)
    assert planned(bench.step()) == {1: 10, 2: 10, 3: 10}


def test_siblings_have_one_list_of_tokens_until_they_run() -> None:
    bench = Bench(max_num_seqs=2)
    first, second, third = bench.add_siblings(3, PROMPT)
    bench.steps(2)
    assert third.state is State.WAITING
    assert third.token_ids == PROMPT
    assert first.token_ids is not second.token_ids
    assert (first.num_output_tokens, second.num_output_tokens) == (2, 1)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_next_sibling_takes_over_when_the_first_ends_too_early(num_steps: int) -> None:
    bench = Bench(budget=8, caching=False)
    first, second, third = bench.add_siblings(3, PROMPT)
    bench.steps(num_steps)
    bench.abort(first)
    assert [planned(plan) for plan in bench.steps(3)] == [{2: 8}, {2: 2}, {2: 1, 3: 2}]
    assert third.block_ids[:2] == second.block_ids[:2]


def test_siblings_whose_donor_has_ended_fall_back_to_another_that_runs() -> None:
    bench = Bench(caching=False, max_num_seqs=2)
    first, second, third = bench.add_siblings(3, PROMPT)
    bench.steps(2)
    bench.abort(first)
    assert planned(bench.step()) == {2: 1, 3: 2}
    assert third.block_ids[:2] == second.block_ids[:2]


@pytest.mark.parametrize(("caching", "num_tokens"), [(True, 2), (False, 10)])
def test_siblings_of_which_none_runs_fall_back_to_the_cache_or_compute(
    caching: bool, num_tokens: int
) -> None:
    bench = Bench(caching=caching, max_num_seqs=1)
    bench.add_siblings(2, PROMPT, max_tokens=1)
    bench.step()
    assert planned(bench.step()) == {2: num_tokens}


def test_siblings_of_a_request_that_skips_the_cache_share_all_the_same() -> None:
    bench = Bench()
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    bench.add_siblings(2, PROMPT, skip_reading_prefix_cache=True)
    assert [planned(plan) for plan in bench.steps(2)] == [{2: 10}, {2: 1, 3: 2}]


def test_all_siblings_may_end_in_any_state() -> None:
    bench = Bench(max_num_seqs=2)
    siblings = bench.add_siblings(5, PROMPT)
    bench.steps(2)
    bench.abort(*siblings)
    bench.abort(*bench.add_siblings(5, PROMPT))
    assert bench.scheduler.num_waiting == bench.scheduler.backlog.num_tokens == 0
    bench.run_to_the_end()


# ---- what is queued


def test_the_backlog_counts_requests_without_a_first_step_and_one_prompt_for_siblings() -> None:
    bench = Bench(max_num_seqs=1)
    backlog = bench.scheduler.backlog
    alone = bench.add(7, max_tokens=1)
    siblings = bench.add_siblings(3, PROMPT, max_tokens=1)
    assert (backlog.num_requests, backlog.num_tokens) == (4, 17)
    bench.step()
    assert alone.state is State.FINISHED
    assert (backlog.num_requests, backlog.num_tokens) == (3, 10)
    bench.abort(siblings[0])
    assert (backlog.num_requests, backlog.num_tokens) == (2, 10)
    bench.step()
    assert (backlog.num_requests, backlog.num_tokens) == (1, 10)
    bench.step()
    assert (backlog.num_requests, backlog.num_tokens) == (0, 0)


# ---- prior output


def test_prior_output_counts_for_max_tokens() -> None:
    bench = Bench()
    request = bench.add(4, prior=[1004, 1005], max_tokens=3)
    assert planned(bench.step()) == {1: 6}
    assert request.token_ids[4:] == [1004, 1005, 1006]
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("min_tokens", "num_output"), [(2, 3), (3, 4), (4, 5)])
def test_prior_output_counts_for_min_tokens(min_tokens: int, num_output: int) -> None:
    bench = Bench()
    stops = tuple(range(1000, 1020))
    request = bench.add(4, prior=[7, 8], min_tokens=min_tokens, stop_token_ids=stops)
    bench.run_to_the_end()
    assert request.num_output_tokens == num_output


def test_prior_output_counts_for_repetition() -> None:
    bench = Bench()
    request = bench.add(4, prior=[1006, 1007, 1006], repetition=RepetitionDetection(2, 2, 2))
    bench.step()
    assert request.finish_reason is FinishReason.REPETITION
    assert request.token_ids[4:] == [1006, 1007, 1006, 1007]


def test_repetition_ends_nothing_before_min_tokens() -> None:
    bench = Bench()
    request = bench.add(
        1, prior=[5, 5], min_tokens=3, repetition=RepetitionDetection(1, 1, 2), max_tokens=9
    )
    bench.run_to_the_end()
    assert request.finish_reason is FinishReason.LENGTH


# ---- prompt positions to score


def scored(num_prompt_logprobs: int | None = 0, start: int = 0) -> dict[str, LogprobsRequest]:
    return {
        "logprobs": LogprobsRequest(num_prompt_logprobs=num_prompt_logprobs, prompt_start=start)
    }


@pytest.mark.parametrize(
    ("start", "num_cached"),
    [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8), (1000, 8)],
)
def test_the_cache_is_read_only_before_the_first_position_to_score(
    start: int, num_cached: int
) -> None:
    bench = Bench()
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    request = bench.add(PROMPT, **scored(start=start))
    assert planned(bench.step()) == {2: 10 - num_cached}
    assert request.num_cached_tokens == num_cached


def test_logprobs_of_the_output_alone_do_not_keep_from_the_cache() -> None:
    bench = Bench()
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    bench.add(PROMPT, **scored(None))
    assert planned(bench.step()) == {2: 2}


def test_a_scored_prompt_is_left_in_the_cache_for_others() -> None:
    bench = Bench()
    bench.add(PROMPT, max_tokens=1, **scored())
    bench.step()
    bench.add(PROMPT)
    assert planned(bench.step()) == {2: 2}


def test_positions_are_scored_as_they_are_computed() -> None:
    bench = Bench(budget=4, max_num_seqs=4)
    request = bench.add(PROMPT, **scored())
    told = []
    for _ in range(4):
        told.append(request.num_scored)
        bench.step()
    assert told == [1, 5, 9, 10]


def test_a_runner_that_collects_a_prompts_chunks_is_asked_for_all_of_its_rows_at_the_end() -> None:
    bench = Bench(budget=4, max_num_seqs=4)
    bench.collects_chunks = True
    request = bench.add(PROMPT, **scored())
    told = []
    for _ in range(4):
        told.append(request.num_scored)
        bench.step()
    assert told == [1, 1, 1, 10]


def test_no_more_rows_are_scored_in_a_step_than_there_is_room_for() -> None:
    bench = Bench(max_scored_rows=3)
    bench.add(PROMPT, **scored())
    bench.add(PROMPT)
    assert [planned(plan) for plan in bench.steps(4)] == [
        {1: 3, 2: 10},
        {1: 3, 2: 1},
        {1: 3, 2: 1},
        {1: 1, 2: 1},
    ]


def test_what_has_been_scored_may_be_read_from_the_cache_after_preemption() -> None:
    bench = Bench(budget=8, max_num_seqs=1, policy="priority")
    request = bench.add(PROMPT, priority=1, **scored())
    bench.step()
    bench.add(2, priority=0, max_tokens=1)
    bench.step()
    assert request.state is State.PREEMPTED
    assert request.num_scored == 9
    assert planned(bench.step()) == {1: 2}


def test_skipping_the_cache_computes_the_whole_prompt_once() -> None:
    bench = Bench(max_num_seqs=1, policy="priority")
    bench.add(PROMPT, max_tokens=1)
    bench.step()
    request = bench.add(PROMPT, priority=1, skip_reading_prefix_cache=True)
    assert planned(bench.step()) == {2: 10}
    assert request.num_cached_tokens == 0
    bench.add(2, priority=0, max_tokens=1)
    bench.step()
    assert request.state is State.PREEMPTED
    assert planned(bench.step()) == {2: 3}


def test_only_the_first_sibling_scores_the_prompt_and_an_heir_all_of_it() -> None:
    bench = Bench(budget=4, max_num_seqs=4)
    first, second, third = bench.add_siblings(3, PROMPT, **scored())
    bench.step()
    assert [r.num_scored for r in (first, second, third)] == [5, 10, 10]
    bench.abort(first)
    assert [r.num_scored for r in (second, third)] == [1, 10]
    assert planned(bench.step()) == {2: 4}


# ---- the cap on long prompts


def test_a_long_prompt_that_is_alone_gets_the_whole_budget() -> None:
    bench = Bench(budget=16, long_prefill_token_threshold=4)
    bench.add(40)
    plans = bench.steps(3)
    assert [planned(plan) for plan in plans] == [{1: 16}, {1: 16}, {1: 8}]
    assert [sampled(plan) for plan in plans] == [[], [], [1]]


def test_a_long_prompt_is_capped_when_others_run_or_come() -> None:
    bench = Bench(budget=16, long_prefill_token_threshold=4)
    bench.add(40)
    bench.step()
    bench.add(2)
    assert [planned(plan) for plan in bench.steps(3)] == [{1: 4, 2: 2}, {1: 4, 2: 1}, {1: 4, 2: 1}]
    bench.abort(bench.requests[1])
    assert planned(bench.step()) == {1: 12}


def test_two_long_prompts_cap_each_other() -> None:
    bench = Bench(budget=16, long_prefill_token_threshold=4)
    bench.add(20), bench.add(30)
    plans = bench.steps(5)
    assert [planned(plan) for plan in plans] == [{1: 4, 2: 4}] * 5
    assert sampled(plans[-1]) == [1]


@pytest.mark.parametrize(("max_num_seqs", "num_blocks"), [(1, 64), (8, 11)])
def test_a_prompt_is_not_capped_for_one_that_cannot_join(
    max_num_seqs: int, num_blocks: int
) -> None:
    bench = Bench(
        budget=16,
        long_prefill_token_threshold=4,
        max_num_seqs=max_num_seqs,
        num_blocks=num_blocks,
    )
    bench.add(40)
    bench.add(8)
    assert planned(bench.step()) == {1: 16}


def test_alone_more_rows_are_scored_no_more_than_in_company() -> None:
    bench = Bench(budget=16, long_prefill_token_threshold=4, max_scored_rows=6)
    bench.add(40, **scored())
    assert planned(bench.step()) == {1: 6}


# ---- clients


def test_slots_are_shared_between_clients_by_tokens() -> None:
    bench = Bench(max_num_seqs=1)
    for _ in range(4):
        bench.add(6, client=b"a", max_tokens=4)
    bench.add(6, client=b"b", max_tokens=14)  # as much as two of the other's
    bench.add(6, client=b"b", max_tokens=4)
    order = [key for plan in bench.run_to_the_end() for key in planned(plan)]
    assert list(dict.fromkeys(order)) == [1, 5, 2, 3, 6, 4]


def test_a_client_that_left_starts_again_with_nothing() -> None:
    bench = Bench()
    request = bench.add(4, client=b"b")
    bench.step()
    bench.abort(request)
    bench.scheduler.forget(b"b")
    assert not bench.scheduler._waiting.is_shared


# ---- results


def test_an_error_ends_its_request_alone_and_without_a_token() -> None:
    bench = Bench()
    good, bad = bench.add(PROMPT), bench.add(9)
    bench.step(errors={1: RowError(ErrorKind.PROCESSOR, "it raised")})
    assert (bad.state, bad.finish_reason) == (State.FINISHED, FinishReason.ERROR)
    assert (good.num_output_tokens, bad.num_output_tokens) == (1, 0)
    assert bench.finished == []
    assert bench.pool.num_free == 64 - 3
    assert bench.step().released == [bad.key]


def test_what_a_failed_request_computed_last_does_not_enter_the_cache() -> None:
    bench = Bench(budget=8)
    bench.add(PROMPT)
    bench.step()
    bench.step(errors={0: RowError(ErrorKind.LOGITS, "NaN")})
    assert bench.pool.num_cached == 2  # of the step before
    bench.add(9)
    bench.step()
    bench.step(errors={0: RowError(ErrorKind.LOGITS, "NaN")})
    assert bench.pool.num_cached == 4
    bench.add(list(range(50, 58)))
    bench.step(errors={0: RowError(ErrorKind.LOGITS, "NaN")})
    assert bench.pool.num_cached == 4


NAN = RowError(ErrorKind.LOGITS, "NaN", is_corrupted=True)


def test_what_a_corrupted_request_computed_before_is_not_served_to_others() -> None:
    bench = Bench(budget=8)
    bench.add(PROMPT)
    bench.step()
    assert bench.pool.num_cached == 2
    bench.step(errors={0: NAN})
    assert bench.pool.num_cached == 0
    again = bench.add(PROMPT)
    bench.step()
    assert again.num_cached_tokens == 0


def test_blocks_that_a_corrupted_request_shares_keep_their_names_until_their_last_holder() -> None:
    bench = Bench()
    bench.add(PROMPT)
    bench.step()
    bench.add([*PROMPT[:8], 99, 98, 97, 96, 95])
    bench.step()
    assert bench.pool.num_cached == 3
    bench.step(errors={1: NAN})
    assert bench.pool.num_cached == 3, "its own third block has gone, and the other's has come"
    bench.step(errors={0: NAN})
    assert bench.pool.num_cached == 0


def test_a_request_that_failed_in_the_model_leaves_what_it_computed_before() -> None:
    bench = Bench(budget=8)
    request = bench.add(PROMPT)
    bench.step()
    plan = bench.scheduler.schedule(now=0.0)
    plan.num_new_tokens, plan.sampling = [0], []
    error = RowError(ErrorKind.INTERNAL, "it raised")
    assert bench.scheduler.update(plan, StepResult(failed={0: error})) == []
    bench.scheduler.check_ledger()
    assert (request.state, request.finish_reason) == (State.FINISHED, FinishReason.ERROR)
    assert (bench.pool.num_cached, bench.pool.num_free) == (2, 64)


def short_of_memory(bench: Bench, index: int) -> StepPlan:
    """A step in which one request finds no memory."""
    plan = bench.scheduler.schedule(now=0.0)
    plan.num_new_tokens[index] = 0
    plan.sampling.remove(index)
    tokens = [FIRST_OUTPUT_ID + len(plan.requests[i].token_ids) for i in plan.sampling]
    bench.scheduler.update(plan, StepResult(tokens, short_of_memory={index}))
    bench.scheduler.check_ledger()
    return plan


def test_the_last_in_rank_makes_room_and_comes_back_when_another_has_ended() -> None:
    bench = Bench()
    first, second, last = bench.add(4), bench.add(4), bench.add(4, max_tokens=9)
    bench.step()
    short_of_memory(bench, 0)
    assert (last.state, first.short_at) == (State.PREEMPTED, 5)
    assert [planned(plan) for plan in bench.steps(2)] == [{1: 1, 2: 1}] * 2, "no room yet"
    bench.abort(second)
    assert planned(bench.step()) == {1: 1, 3: 2}, "with its cached block, and what it had said"
    assert last.num_output_tokens == 3


def test_one_that_is_the_last_itself_makes_room_for_others() -> None:
    bench = Bench()
    first, last = bench.add(4), bench.add(4)
    bench.step()
    short_of_memory(bench, 1)
    assert (first.state, last.state, last.short_at) == (State.RUNNING, State.PREEMPTED, 5)
    bench.abort(first)
    bench.step()
    assert last.state is State.RUNNING


def test_one_that_is_left_alone_keeps_its_place() -> None:
    bench = Bench()
    only = bench.add(4)
    bench.step()
    short_of_memory(bench, 0)
    assert only.state is State.RUNNING and bench.scheduler.num_preemptions == 0


# ---- alone


def test_a_lone_request_has_its_steps_for_itself_until_it_has_a_token() -> None:
    bench = Bench(budget=8)
    other = bench.add(4)
    bench.step()
    held = list(other.block_ids)
    bench.add(20, runs_alone=True)
    late = bench.add(4)
    assert [planned(plan) for plan in bench.steps(3)] == [{2: 8}, {2: 8}, {2: 4}]
    assert other.block_ids == held
    assert planned(bench.step()) == {1: 1, 2: 1, 3: 4}
    assert late.state is State.RUNNING


def test_lone_requests_run_one_after_the_other() -> None:
    bench = Bench()
    for _ in range(3):
        bench.add(4, runs_alone=True)
    bench.add(4)
    plans = [planned(plan) for plan in bench.steps(4)]
    assert plans[:3] == [{1: 4}, {2: 4}, {3: 4}]
    assert plans[3] == {1: 1, 2: 1, 3: 1, 4: 4}


def test_a_lone_request_is_like_any_other_after_its_first_token() -> None:
    bench = Bench(num_blocks=4)
    lone, better = bench.add(4, runs_alone=True), bench.add(4)
    bench.scheduler.finish(better, FinishReason.ABORT)
    bench.step()
    assert not lone.runs_alone
    first = bench.add(3, arrival_time=-1.0)
    bench.steps(7)
    assert lone.state is State.PREEMPTED and first.state is State.RUNNING
    bench.abort(first)
    assert planned(bench.step()).keys() == {lone.key}


@pytest.mark.parametrize("size", [{"max_num_seqs": 1}, {"num_blocks": 3}])
def test_a_lone_request_waits_for_its_place_while_others_run(size: dict[str, int]) -> None:
    bench = Bench(**size)  # type: ignore[arg-type]
    running = bench.add(6, max_tokens=3)
    bench.step()
    bench.add(8, runs_alone=True, max_tokens=2)
    bench.add(2, max_tokens=2)
    assert [planned(plan) for plan in bench.steps(2)] == [{1: 1}] * 2
    assert running.state is State.FINISHED
    assert planned(bench.step()) == {2: 8}
    bench.run_to_the_end()


def test_lone_siblings_share_their_prompt_and_run_one_by_one() -> None:
    bench = Bench()
    bench.add_siblings(3, PROMPT, runs_alone=True)
    plans = [planned(plan) for plan in bench.steps(4)]
    assert plans == [{1: 10}, {2: 2}, {3: 2}, {1: 1, 2: 1, 3: 1}]


def test_an_urgent_request_waits_while_one_runs_alone() -> None:
    bench = Bench(budget=8, policy="priority")
    bench.add(20, runs_alone=True, priority=5)
    bench.step()
    bench.add(4, priority=0)
    assert [planned(plan) for plan in bench.steps(2)] == [{1: 8}, {1: 4}]
    assert planned(bench.step()) == {1: 1, 2: 4}


def test_an_urgent_lone_request_displaces_others_as_any_other_would() -> None:
    bench = Bench(num_blocks=4, policy="priority", max_model_len=16)
    worse = bench.add(9, priority=5)
    bench.step()
    bench.add(9, priority=0, runs_alone=True)
    assert planned(bench.step()) == {2: 9}
    assert worse.state is State.PREEMPTED


def test_a_lone_request_that_ends_lets_others_go_on() -> None:
    bench = Bench(budget=8)
    other = bench.add(4)
    lone = bench.add(20, runs_alone=True)
    bench.steps(2)
    bench.abort(lone)
    assert planned(bench.step()) == {1: 1}
    lone = bench.add(20, runs_alone=True)
    bench.steps(2)
    bench.step(errors={0: RowError(ErrorKind.LOGITS, "NaN")})
    assert planned(bench.step()) == {1: 1}
    assert lone.state is State.FINISHED and other.state is State.RUNNING


def test_the_next_sibling_takes_over_when_the_first_fails_with_its_prompt() -> None:
    bench = Bench()
    first, second = bench.add_siblings(2, PROMPT)
    bench.step(errors={0: RowError(ErrorKind.LOGITS, "NaN")})
    assert planned(bench.step()) == {2: 10}
    assert (first.finish_reason, second.num_output_tokens) == (FinishReason.ERROR, 1)


def test_a_complete_grammar_ends_a_request_behind_its_token() -> None:
    bench = Bench()
    other, done = bench.add(4), bench.add(4, min_tokens=5)
    bench.step(complete=1)
    assert (done.finish_reason, done.num_output_tokens) == (FinishReason.STOP, 1)
    assert bench.finished == [done]
    assert other.state is State.RUNNING


def test_a_complete_grammar_at_the_last_allowed_position_is_a_stop() -> None:
    bench = Bench()
    done = bench.add(4, max_tokens=1)
    bench.step(complete=0)
    assert done.finish_reason is FinishReason.STOP
    assert bench.finished == [done]


def test_a_row_with_an_error_is_not_complete() -> None:
    bench = Bench()
    bad = bench.add(4)
    bench.step(errors={0: RowError(ErrorKind.GRAMMAR, "no")}, complete=0)
    assert bad.finish_reason is FinishReason.ERROR
