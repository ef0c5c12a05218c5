"""The per-request path keeps a cache exactly as long as it is valid."""

from itertools import accumulate
from typing import Any

import msgspec
import pytest
import torch
from torch.nn.functional import one_hot

from footplate.backend.request import Request
from footplate.backend.runner.per_request_runner import (
    CachedModel,
    CacheError,
    PerRequestRunner,
    probe_chunks,
)
from footplate.backend.runner.sampler import Sampler
from footplate.backend.step import RunnerFacts, StepPlan
from footplate.protocol.messages import ModelFacts
from footplate.protocol.token_params import LogprobsMode, LogprobsRequest, TokenParams

GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 8, 0, ())
FACTS = RunnerFacts(ModelFacts("", "", "", 50, 64, (), "", "", ""), 16, False)


class SummingModel(CachedModel):
    """Its next token is the sum of all tokens so far, modulo 50; its cache is that sum."""

    def __init__(self) -> None:
        self.num_forwards: list[int] = []
        self.fails = False
        self.fails_at = 0  # the number of a forward, from one

    def forward(
        self, token_ids: list[int], cache: Any, num_rows: int = 1
    ) -> tuple[torch.Tensor, Any]:
        self.num_forwards.append(len(token_ids))
        if self.fails or len(self.num_forwards) == self.fails_at:
            raise RuntimeError("no luck")
        sums = [(cache or 0) + total for total in accumulate(token_ids)]
        return one_hot(torch.tensor(sums[-num_rows:]) % 50, 50).float(), sums[-1]


def request(tokens: list[int], key: int = 1) -> Request:
    return Request(key, b"", key, tokens, len(tokens), GREEDY)


def step(runner: PerRequestRunner, *pieces: tuple[Request, int], released: Any = ()) -> list[int]:
    """Compute `count` tokens of each request, as a scheduler would."""
    plan = StepPlan(released=list(released))
    for index, (one, count) in enumerate(pieces):
        plan.requests.append(one)
        plan.num_new_tokens.append(count)
        if one.num_computed_tokens + count == len(one.token_ids):
            plan.sampling.append(index)
    sampled = runner.execute(plan).token_ids
    for one, count in pieces:
        one.num_computed_tokens += count
    for index, token in zip(plan.sampling, sampled, strict=True):
        plan.requests[index].token_ids.append(token)
    return sampled


def test_a_cache_is_continued() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    one, two = request([1, 2, 3, 4, 5]), request([7, 8], key=2)
    assert step(runner, (one, 3)) == []
    assert step(runner, (two, 2), (one, 2)) == [15, 15]
    assert step(runner, (one, 1), (two, 1)) == [30, 30]
    assert model.num_forwards == [3, 2, 2, 1, 1]


def test_chunks_are_collected_where_they_must_be() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=False)
    one = request([1, 2, 3, 4, 5])
    assert step(runner, (one, 3)) == []
    assert step(runner, (one, 2)) == [15]
    assert step(runner, (one, 1)) == [30]
    assert model.num_forwards == [5, 1]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_preempted_request_starts_afresh(is_told: bool) -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    one = request([1, 2, 3])
    assert step(runner, (one, 3)) == [6]
    one.num_computed_tokens = 0
    assert step(runner, (one, 4), released=[1] if is_told else []) == [12]
    assert model.num_forwards == [3, 4]


def test_a_released_request_keeps_nothing() -> None:
    runner = PerRequestRunner(SummingModel(), FACTS, Sampler(), prefill_in_chunks=True)
    step(runner, (request([1, 2, 3]), 3))
    assert runner._states
    assert step(runner, released=[1, 99]) == []
    assert not runner._states


def test_a_repeated_step_gives_the_same_tokens() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    one = request([1, 2, 3])
    plan = StepPlan([one], [3], [0])
    assert runner.execute(plan).token_ids == runner.execute(plan).token_ids == [6]


def test_a_failed_forward_leaves_no_half_written_cache() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    one = request([1, 2, 3])
    step(runner, (one, 2))
    model.fails = True
    with pytest.raises(RuntimeError):
        runner.execute(StepPlan([one], [1], [0]))
    model.fails = False
    assert step(runner, (one, 1)) == [6]
    assert model.num_forwards == [2, 1, 3]


def prefilled(runner: PerRequestRunner, count: int) -> list[Request]:
    """Requests that have had their first token."""
    requests = [request([key, 2, 3], key=key) for key in range(count)]
    step(runner, *[(one, 3) for one in requests])
    return requests


def decode(requests: list[Request]) -> StepPlan:
    return StepPlan(list(requests), [1] * len(requests), list(range(len(requests))))


def test_rows_of_a_step_that_raised_are_not_computed_twice() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    requests = prefilled(runner, 4)
    expected = [sum(one.token_ids) % 50 for one in requests]
    model.num_forwards.clear()
    model.fails_at = 3
    with pytest.raises(RuntimeError):
        runner.execute(decode(requests))
    model.fails_at = 0
    assert runner.execute(decode(requests[:2])).token_ids == expected[:2]
    assert runner.execute(decode(requests[2:])).token_ids == expected[2:]
    # The third lost a cache that cannot be taken back, and began anew.
    assert model.num_forwards == [1, 1, 1, 4, 1]
    assert not runner._rows
    for one, token in zip(requests, expected, strict=True):
        one.num_computed_tokens += 1
        one.token_ids.append(token)
    step(runner, *[(one, 1) for one in requests])
    assert model.num_forwards[5:] == [1] * 4


def test_rows_that_nothing_was_made_of_are_dropped_with_their_request() -> None:
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    requests = prefilled(runner, 2)
    model.fails_at = len(model.num_forwards) + 2
    with pytest.raises(RuntimeError):
        runner.execute(decode(requests))
    assert runner._rows.keys() == {0}
    step(runner, released=[0, 1])
    assert not runner._rows and not runner._states


def test_rows_of_another_chunk_are_computed() -> None:
    """A step that did not fit into memory is run again with a shorter one."""
    model = SummingModel()
    runner = PerRequestRunner(model, FACTS, Sampler(), prefill_in_chunks=True)
    one, two = request([1, 2, 3, 4]), request([5, 6], key=2)
    model.fails_at = 2
    with pytest.raises(RuntimeError):
        runner.execute(StepPlan([one, two], [4, 2], [0, 1]))
    assert step(runner, (one, 2)) == []
    assert step(runner, (one, 2), (two, 2)) == [10, 11]


class Interrupted(torch.nn.Module):
    """A layer that raises when it is told to, behind others that have cached their part."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_broken = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **options: Any) -> Any:
        output = self.layer(*args, **options)
        if self.is_broken:
            raise RuntimeError("in the middle")
        return output


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_is_taken_back_to_the_last_bit_when_a_forward_raises(window: int | None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 50}
    config = MistralConfig(
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        sliding_window=window,
        **options,
    )
    network: Any = MistralForCausalLM(config)
    network.eval()
    broken = network.model.layers[1] = Interrupted(network.model.layers[1])
    model = CachedModel(network)

    def run(*, interrupted: bool) -> list[bytes]:
        rows, cache = [], None
        for number, tokens in enumerate(([1, 2, 3, 4, 5], [6, 7], [8], [9])):
            if interrupted and number:
                take_back = model.remember(cache)
                assert take_back is not None
                broken.is_broken = True
                with pytest.raises(RuntimeError):
                    model.forward([30, 31, 32], cache)
                broken.is_broken = False
                take_back()
            logits, cache = model.forward(tokens, cache)
            rows.append(logits.numpy().tobytes())
        return rows

    assert run(interrupted=True) == run(interrupted=False)


def test_a_cache_that_changes_in_place_is_not_taken_back() -> None:
    from transformers import StaticCache

    model = SummingModel()
    assert model.remember(None) is None
    assert model.remember(17) is None
    assert model.remember(object.__new__(StaticCache)) is None


class Encoder(torch.nn.Module):
    """A model that generates nothing."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(CacheError, match="Encoder takes no cache"):
        CachedModel(Encoder())


def test_a_cache_that_changes_the_logits_is_refused(tmp_path: Any) -> None:
    from transformers import BertConfig, BertLMHeadModel

    options: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    config = BertConfig(num_attention_heads=2, intermediate_size=16, is_decoder=False, **options)
    model: Any = BertLMHeadModel(config)
    with pytest.raises(CacheError):
        probe_chunks(model.eval(), CachedModel(model), tolerance=1e-3)


# ---- logprobs of prompts


def scoring(tokens: list[int], **fields: Any) -> Request:
    one = request(tokens)
    wanted = LogprobsRequest(num_prompt_logprobs=0, mode=LogprobsMode.RAW_LOGITS, **fields)
    one.params = msgspec.structs.replace(GREEDY, logprobs=wanted)
    return one


def scores_of(runner: PerRequestRunner, one: Request, count: int) -> list[tuple[int, int, float]]:
    """Position, token and logit, in which the sum of all tokens before it has 1 and others 0."""
    start = one.num_computed_tokens
    sampling = [0] if start + count == len(one.token_ids) else []
    result = runner.execute(StepPlan([one], [count], sampling))
    one.num_computed_tokens += count
    if (scored := result.prompt_logprobs.get(0)) is None:
        return []
    ids = torch.frombuffer(bytearray(scored.token_ids), dtype=torch.int32).tolist()
    logits = torch.frombuffer(bytearray(scored.logprobs), dtype=torch.float32).tolist()
    positions = range(scored.position, scored.position + len(ids))
    return list(zip(positions, ids, logits, strict=True))


def test_prompt_tokens_are_scored_by_the_rows_before_them() -> None:
    tokens = [1, 1, 3, 5, 10]
    expected = [(1, 1, 1.0), (2, 3, 0.0), (3, 5, 1.0), (4, 10, 1.0)]
    for lengths in ((5,), (1, 4), (3, 2), (4, 1), (1, 1, 1, 1, 1)):
        runner = PerRequestRunner(SummingModel(), FACTS, Sampler(), prefill_in_chunks=True)
        one = scoring(tokens)
        assert [s for count in lengths for s in scores_of(runner, one, count)] == expected


def test_collected_chunks_are_scored_at_once_and_with_their_last() -> None:
    runner = PerRequestRunner(SummingModel(), FACTS, Sampler(), prefill_in_chunks=False)
    one = scoring([1, 1, 3, 5, 10])
    assert scores_of(runner, one, 3) == []
    assert [position for position, _, _ in scores_of(runner, one, 2)] == [1, 2, 3, 4]


def test_prompt_positions_that_have_been_told_are_not_told_again() -> None:
    runner = PerRequestRunner(SummingModel(), FACTS, Sampler(), prefill_in_chunks=True)
    one = scoring([1, 1, 3, 5, 10])
    one.num_scored = 3
    assert [position for position, _, _ in scores_of(runner, one, 5)] == [3, 4]
    one = scoring([1, 1, 3, 5, 10], prompt_start=4)
    assert [position for position, _, _ in scores_of(runner, one, 5)] == [4]
