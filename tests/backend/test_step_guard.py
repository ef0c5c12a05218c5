"""A step that raises is run again in parts: the culprit ends, and nobody else notices."""

import random
from collections.abc import Callable
from math import log2
from typing import Any

import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.request import Request
from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.step import RowError, RunnerFacts, ScoredRows, StepPlan, StepResult
from footplate.backend.step_guard import (
    STEPS_TO_RECOVER,
    StepGuard,
    is_device_lost,
    is_out_of_memory,
)
from footplate.backend.termination import Terminated
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import (
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    ModelFacts,
)
from footplate.protocol.token_params import TokenParams

VOCAB_SIZE = 100
MARK = 99  # a prompt that has this token makes its step raise
PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 12, 0, ())
CLIENT = b"client"
FACTS = RunnerFacts(
    ModelFacts("", "", "", VOCAB_SIZE, 200, (), "", "", ""), 100, supports_prefix_caching=True
)

Check = Callable[[StepPlan], None]


class ScriptedRunner:
    """The next token is a function of all tokens so far, and of what is cached for them; `check`
    may raise, before or after something was written."""

    def __init__(self, check: Check = lambda plan: None) -> None:
        self.facts = FACTS
        self.check = check
        self.plans: list[StepPlan] = []
        self.released: list[int] = []
        self._memory: dict[tuple[int, int], int] = {}  # by block and offset: a token

    def execute(self, plan: StepPlan) -> StepResult:
        self.released += plan.released
        if not plan.requests:
            return StepResult()
        self.plans.append(plan)
        for request, count in zip(plan.requests, plan.num_new_tokens, strict=True):
            assert count > 0
            for position in range(request.num_computed_tokens, request.num_computed_tokens + count):
                place = request.block_ids[position // 4], position % 4
                self._memory[place] = request.token_ids[position]
        self.check(plan)
        return StepResult([self._sample(plan.requests[index]) for index in plan.sampling])

    def _sample(self, request: Request) -> int:
        length = len(request.token_ids)
        cached = [self._memory[request.block_ids[p // 4], p % 4] for p in range(length)]
        assert cached == request.token_ids, "computed from what another wrote"
        position = length - request.num_prompt_tokens
        return next_token(digest_prefix(cached), position, request.params, VOCAB_SIZE - 1)


class Accident(ScriptedRunner):
    """Counts its calls."""

    num_calls = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_calls += bool(plan.requests)
        return super().execute(plan)


def has_mark(request: Request) -> bool:
    return MARK in request.token_ids[: request.num_prompt_tokens]


def fail_on_marks(plan: StepPlan) -> None:
    if any(map(has_mark, plan.requests)):
        raise ValueError("marked")


def fail_beyond(most: int) -> Check:
    def check(plan: StepPlan) -> None:
        if plan.num_tokens > most:
            raise MemoryError(f"{plan.num_tokens} tokens")

    return check


class Bench:
    """A core over a runner, and what its client is told."""

    def __init__(self, runner: Any, **scheduler: Any) -> None:
        self.runner = runner
        self.core = EngineCore(
            runner,
            CacheConfig(block_size=4),
            SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 64} | scheduler),
            epoch=1,
            clock=lambda: 0.0,
        )
        self.core.join(CLIENT)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished] = {}

    def add(self, handle: int, prompt: list[int], **options: Any) -> None:
        self.tokens[handle] = []
        self.core.handle(CLIENT, AddRequest(handle, prompt, PARAMS, **options))

    def step(self) -> None:
        self.core.step()
        self.core.check_ledger()
        for _, outputs in self.core.take_outputs():
            columns = zip(outputs.handles, outputs.positions, outputs.token_ids, strict=True)
            for handle, position, token in columns:
                assert position == len(self.tokens[handle])
                self.tokens[handle].append(token)
            for finished in outputs.finished:
                assert finished.handle not in self.ends
                self.ends[finished.handle] = finished

    def run(self) -> "Bench":
        for _ in range(2000):
            if not self.core.has_work:
                assert self.core.stats().num_free_blocks == FACTS.num_kv_blocks
                return self
            self.step()
        raise AssertionError("no end in sight")


def clean_run(prompts: dict[int, list[int]]) -> dict[int, list[int]]:
    bench = Bench(ScriptedRunner())
    for handle, prompt in prompts.items():
        bench.add(handle, prompt)
    return bench.run().tokens


def plan_of(size: int, marked: set[int] = frozenset()) -> StepPlan:  # type: ignore[assignment]
    """A step of decodes."""
    plan = StepPlan(released=[1000])
    for index in range(size):
        tokens = [MARK if index in marked else 1, index % 50]
        request = Request(index, CLIENT, index, tokens, 2, PARAMS, num_computed_tokens=1)
        plan.requests.append(request)
    plan.num_new_tokens = [1] * size
    plan.sampling = list(range(size))
    return plan


class Counting:
    """Tokens that tell whose they are, and how often the runner was asked."""

    def __init__(self, check: Check) -> None:
        self.facts = FACTS
        self.check = check
        self.num_calls = 0
        self.released: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_calls += 1
        self.released += plan.released
        self.check(plan)
        return StepResult([plan.requests[index].key for index in plan.sampling])


# ---- the culprit


def test_an_accident_of_one_step_ends_nobody_not_even_who_is_alone() -> None:
    def fail_at(call: int) -> Check:
        def check(plan: StepPlan) -> None:
            if bench.runner.num_calls == call:
                raise ValueError("an accident")

        return check

    for size in (1, 2, 5):
        for call in range(1, 13):
            prompts = {handle: [handle + 1, 2] for handle in range(size)}
            bench = Bench(Accident(fail_at(call)))
            for handle, prompt in prompts.items():
                bench.add(handle, prompt)
            assert bench.run().tokens == clean_run(prompts)
            assert bench.core.stats().num_void_steps == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 100, 256])
def test_a_culprit_is_found_in_few_steps_wherever_it_stands(size: int) -> None:
    for culprit in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
        runner = Counting(fail_on_marks)
        guard = StepGuard(runner)
        done, result = guard.execute(plan_of(size, {culprit}))
        others = [index for index in range(size) if index != culprit]
        assert result.failed == {
            culprit: RowError(
                ErrorKind.INTERNAL, "the request made its step fail: ValueError: marked"
            )
        }
        assert (done.sampling, result.token_ids) == (others, others)
        assert done.num_new_tokens == [int(index != culprit) for index in range(size)]
        assert runner.num_calls - 1 <= 2 * log2(size) + 1
        assert runner.released == [1000], "told once"
        assert guard.num_void_steps == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_culprits_is_found(seed: int) -> None:
    dice = random.Random(seed)
    size = dice.randint(2, 40)
    marked = set(dice.sample(range(size), dice.randint(1, size - 1)))
    done, result = StepGuard(Counting(fail_on_marks)).execute(plan_of(size, marked))
    assert result.failed.keys() == marked
    assert done.sampling == result.token_ids == sorted(set(range(size)) - marked)


def test_what_a_step_tells_of_its_rows_keeps_its_place() -> None:
    def execute(plan: StepPlan) -> StepResult:
        fail_on_marks(plan)
        keys = [plan.requests[index].key for index in plan.sampling]
        scored = {row: ScoredRows(key, [1], b"", b"") for row, key in enumerate(keys)}
        return StepResult(
            keys,
            errors={
                row: RowError(ErrorKind.LOGITS, "") for row, key in enumerate(keys) if key == 5
            },
            complete={row for row, key in enumerate(keys) if key == 6},
            already_complete={row for row, key in enumerate(keys) if key == 7},
            logprobs=scored,
            prompt_logprobs={
                index: ScoredRows(request.key, [1], b"", b"")
                for index, request in enumerate(plan.requests)
                if request.key % 2
            },
        )

    runner = Counting(lambda plan: None)
    runner.execute = execute  # type: ignore[method-assign]
    plan = plan_of(8, {2})
    plan.sampling.remove(3)  # a chunk of a prompt
    done, result = StepGuard(runner).execute(plan)
    keys = [0, 1, 4, 5, 6, 7]
    assert [done.requests[index].key for index in done.sampling] == result.token_ids == keys
    assert {keys[row] for row in result.errors} == {5}
    assert {keys[row] for row in result.complete} == {6}
    assert {keys[row] for row in result.already_complete} == {7}
    assert {keys[row]: rows.position for row, rows in result.logprobs.items()} == {
        key: key for key in keys
    }
    assert {index: rows.position for index, rows in result.prompt_logprobs.items()} == {
        index: index for index in (1, 3, 5, 7)
    }


def test_a_step_that_fails_once_and_never_again_costs_nobody_anything() -> None:
    def fail_once(plan: StepPlan) -> None:
        if guard.num_void_steps == 0 and len(plan.requests) == 8:
            raise ValueError("once")

    runner = Counting(fail_once)
    guard = StepGuard(runner)
    done, result = guard.execute(plan_of(8))
    assert done.sampling == result.token_ids == list(range(8))
    assert not result.failed and guard.num_void_steps == 1


def test_a_runner_that_fails_with_everybody_is_broken_and_says_why() -> None:
    def fail(plan: StepPlan) -> None:
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        StepGuard(Counting(fail)).execute(plan_of(2))
    with pytest.raises(ValueError):
        StepGuard(Counting(fail)).execute(StepPlan(released=[1]))
    assert StepGuard(Counting(fail)).execute(plan_of(1))[1].failed.keys() == {0}


class AcceleratorError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_lost_device_is_not_blamed_on_a_request(error: Exception) -> None:
    assert is_device_lost(error)

    def fail(plan: StepPlan) -> None:
        raise error

    runner = Counting(fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        StepGuard(runner).execute(plan_of(1))
    assert runner.num_calls == 1


def test_a_device_that_is_lost_while_a_culprit_is_looked_for_ends_the_search() -> None:
    def fail(plan: StepPlan) -> None:
        if len(plan.requests) == 2:
            raise AcceleratorError("CUDA error: device-side assert triggered")
        raise ValueError("marked")

    runner = Counting(fail)
    with pytest.raises(AcceleratorError):
        StepGuard(runner).execute(plan_of(8))
    assert runner.num_calls == 3


@pytest.mark.parametrize("error", [Terminated(143), SystemExit(1), KeyboardInterrupt()])
def test_the_end_of_the_process_is_nobodys_fault(error: BaseException) -> None:
    def fail(plan: StepPlan) -> None:
        raise error

    runner = Counting(fail)
    with pytest.raises(type(error)):
        StepGuard(runner).execute(plan_of(4))
    assert runner.num_calls == 1


def test_what_a_failed_step_had_allocated_is_free_before_the_next_attempt() -> None:
    alive: set[int] = set()

    class Tensor:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def check(plan: StepPlan) -> None:
        assert not alive
        activations: object = Tensor()
        try:
            fail_on_marks(plan)
        except ValueError as error:
            activations = [activations, Tensor()]
            raise RuntimeError("on top") from error
        del activations

    result = StepGuard(Counting(check)).execute(plan_of(8, {3}))[1]
    assert result.failed[3].message == "the request made its step fail: RuntimeError: on top"


def test_a_request_that_fails_is_told_and_others_go_on() -> None:
    prompts = {handle: [handle, 7, 8] for handle in range(8)}
    expected = clean_run(prompts)
    bench = Bench(ScriptedRunner(fail_on_marks))
    for handle, prompt in prompts.items():
        bench.add(handle, [MARK] if handle == 5 else prompt)
    bench.run()
    words = "the request made its step fail: ValueError: marked"
    assert bench.ends.pop(5) == Finished(5, FinishReason.ERROR, words, ErrorKind.INTERNAL)
    assert {end.reason for end in bench.ends.values()} == {FinishReason.LENGTH}
    assert bench.tokens == expected | {5: []}
    assert bench.core.stats().num_void_steps == 1


def test_a_chunk_of_a_prompt_can_be_the_culprit() -> None:
    def fail_on_chunks(plan: StepPlan) -> None:
        for index, request in enumerate(plan.requests):
            if has_mark(request) and index not in plan.sampling:
                raise ValueError("marked")

    bench = Bench(ScriptedRunner(fail_on_chunks), max_num_batched_tokens=16)
    bench.add(1, [1, 2])
    bench.add(2, [MARK] * 40)
    bench.run()
    assert (bench.ends[2].kind, bench.tokens[2]) == (ErrorKind.INTERNAL, [])
    assert bench.tokens[1] == clean_run({1: [1, 2]})[1]


def test_a_request_may_fail_in_the_middle_of_its_output() -> None:
    def fail_later(plan: StepPlan) -> None:
        if any(has_mark(r) and r.num_output_tokens == 5 for r in plan.requests):
            raise ValueError("marked")

    bench = Bench(ScriptedRunner(fail_later))
    for handle in range(4):
        bench.add(handle, [handle, MARK] if handle == 2 else [handle])
    bench.run()
    assert bench.ends[2].reason is FinishReason.ERROR and len(bench.tokens[2]) == 5
    clean = clean_run({handle: [handle] for handle in range(4)})
    assert all(bench.tokens[handle] == clean[handle] for handle in (0, 1, 3))


# ---- memory


@pytest.mark.parametrize("most", [1, 2, 5, 8, 30])
def test_a_step_that_does_not_fit_is_run_in_parts_that_do(most: int) -> None:
    prompts = {handle: [handle] * (3 * handle + 1) for handle in range(10)}
    bench = Bench(ScriptedRunner(fail_beyond(most)))
    for handle, prompt in prompts.items():
        bench.add(handle, prompt)
    bench.run()
    assert bench.tokens == clean_run(prompts)
    assert {end.reason for end in bench.ends.values()} == {FinishReason.LENGTH}
    assert bench.core.stats().num_preemptions == 0


def test_what_has_fitted_is_remembered_and_more_is_tried_again_later() -> None:
    most = 8

    def check(plan: StepPlan) -> None:
        if len(plan.requests) > most:
            raise MemoryError

    runner = Counting(check)
    guard = StepGuard(runner)
    guard.execute(plan_of(16))
    assert (runner.num_calls, guard.num_void_steps) == (3, 1)
    for _ in range(STEPS_TO_RECOVER - 1):
        assert guard.execute(plan_of(16))[1].token_ids == list(range(16))
    assert guard.num_void_steps == 1
    most = 16
    for _ in range(2):
        guard.execute(plan_of(16))
    runner.num_calls = 0
    guard.execute(plan_of(16))
    assert (runner.num_calls, guard.num_void_steps) == (1, 1)


def test_a_long_chunk_that_is_alone_is_halved() -> None:
    runner = ScriptedRunner(fail_beyond(10))
    bench = Bench(runner)
    bench.add(1, [3] * 60)
    bench.run()
    assert bench.tokens[1] == clean_run({1: [3] * 60})[1]
    counts = [plan.num_tokens for plan in runner.plans if plan.num_tokens <= 10]
    assert counts[:8] == [7] * 8, "60 was halved to 7, and remembered"


def fail_marked_in_memory(plan: StepPlan) -> None:
    if any(map(has_mark, plan.requests)):
        raise MemoryError("marked")


def test_a_request_that_never_fits_fails_alone_after_one_other_has_made_room() -> None:
    prompts = {handle: [handle, 4] for handle in range(6)}
    bench = Bench(ScriptedRunner(fail_marked_in_memory))
    for handle, prompt in prompts.items():
        bench.add(handle, [MARK, 4] if handle == 2 else prompt)
    bench.run()
    end = bench.ends.pop(2)
    assert (end.reason, end.kind) == (FinishReason.ERROR, ErrorKind.MEMORY)
    assert end.message == (
        "the request does not fit into memory, though another has made room: MemoryError: marked"
    )
    assert {end.reason for end in bench.ends.values()} == {FinishReason.LENGTH}
    assert bench.tokens == clean_run(prompts) | {2: []}
    assert bench.core.stats().num_preemptions == 1


def test_a_request_that_is_alone_and_does_not_fit_fails_at_once() -> None:
    bench = Bench(ScriptedRunner(fail_marked_in_memory))
    bench.add(1, [MARK, 4])
    bench.run()
    assert bench.ends[1].kind is ErrorKind.MEMORY
    assert "does not fit into memory" in bench.ends[1].message
    bench.add(2, [4])
    bench.run()
    assert bench.ends[2].reason is FinishReason.LENGTH


def test_requests_that_hold_memory_make_room_and_come_back() -> None:
    """As where every request has a cache of its own: so many fit side by side."""
    held: set[int] = set()

    def check(plan: StepPlan) -> None:
        held.difference_update(runner.released)
        for request in plan.requests:
            if request.key not in held and len(held) >= 4:
                raise MemoryError("full")
            held.add(request.key)

    runner = ScriptedRunner(check)
    prompts = {handle: [handle, 4] for handle in range(9)}
    bench = Bench(runner, max_num_seqs=5)
    for handle, prompt in prompts.items():
        bench.add(handle, prompt)
    bench.run()
    assert bench.tokens == clean_run(prompts)
    assert {end.reason for end in bench.ends.values()} == {FinishReason.LENGTH}
    assert bench.core.stats().num_preemptions > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_allocators_say_in_many_ways_that_nothing_is_left(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_device_lost(error)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), OSError(2, "no such file"), RuntimeError("shapes")]
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error) and not is_device_lost(error)


# ---- everything at once


@pytest.mark.parametrize("seed", range(60))
def test_whatever_fails_others_get_the_tokens_of_a_clean_run(seed: int) -> None:
    dice = random.Random(seed)
    most = dice.choice([1, 3, 10, 30, 10**9])
    rate = dice.choice([0.0, 0.02, 0.2])
    chaos = random.Random(seed)

    def check(plan: StepPlan) -> None:
        fail_on_marks(plan)
        fail_beyond(most)(plan)
        # Not with one request alone, or it would be the culprit.
        if len(plan.requests) > 1 and chaos.random() < rate:
            raise RuntimeError("now and then")

    prompts = {
        handle: [handle % 3, *dice.choices(range(50), k=dice.randint(0, 30))]
        for handle in range(dice.randint(1, 20))
    }
    # One: two that are alone together are a broken runner.
    marked = set(dice.sample(sorted(prompts), dice.randint(0, 1)))
    bench = Bench(
        ScriptedRunner(check),
        max_num_seqs=(max_num_seqs := dice.randint(1, 8)),
        max_num_batched_tokens=max_num_seqs + dice.choice([0, 5, 50]),
        policy=dice.choice(["fcfs", "priority"]),
    )
    for handle, prompt in prompts.items():
        lone = dice.random() < 0.2
        bench.add(
            handle,
            [*prompt, MARK] if handle in marked else prompt,
            priority=dice.randint(0, 2),
            run_alone=lone,
        )
        for _ in range(dice.choice([0, 0, 1, 4])):
            bench.step()
    bench.run()
    clean = clean_run(prompts)
    for handle in prompts:
        if handle in marked:
            assert bench.ends[handle].kind is ErrorKind.INTERNAL, f"seed {seed}"
        else:
            assert bench.tokens[handle] == clean[handle], f"seed {seed}"
            assert bench.ends[handle].reason is FinishReason.LENGTH, f"seed {seed}"
