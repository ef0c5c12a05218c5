"""The sampler against its definition: by hand, by a slow reference, by statistics; and the promise
that a row's token does not depend on the rows beside it. All of it in torch, and again on our own
kernels."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels
from footplate.backend.logits.processed import MIN_TEMPERATURE
from footplate.backend.request import Request
from footplate.backend.runner import cutoff, sampler, torch_sampling
from footplate.backend.runner.noise import uniform
from footplate.backend.runner.sampler import Sampler
from footplate.backend.step import StepResult
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    ProcessorCall,
    ThinkingBudget,
    TokenParams,
)

# Probabilities with exact logarithms to think in: token 2 is the most likely, then 0, 3, 1.
PROBS = [0.25, 0.0625, 0.5, 0.125]
REST = 1 - sum(PROBS)  # token 4: as likely as token 1
LOGITS = [math.log(p) for p in [*PROBS, REST]]


@pytest.fixture(autouse=True, scope="module", params=["torch", "kernels"])
def path(request: pytest.FixtureRequest, kernel_folder: Path) -> Iterator[None]:
    """Who does the work for `Sampler()` in this module."""
    kernels = None
    if request.param == "kernels":
        library = build.load(kernel_folder)
        assert library is not None, "this machine has no compiler that works"
        kernels = Kernels(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Sampler", partial(Sampler, kernels))
        yield


def request(position: int = 0, **params: Any) -> Request:
    """A request about to sample its output token number `position`."""
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 0,
        "max_tokens": 1000,
        "min_tokens": 0,
        "stop_token_ids": (),
    }
    return Request(
        key=0,
        client=b"",
        handle=0,
        token_ids=[0] * (3 + position),
        num_prompt_tokens=3,
        params=TokenParams(**(values | params)),
    )


def step(logits: Iterable[Sequence[float]], requests: list[Request]) -> StepResult:
    return Sampler().sample(torch.tensor(list(logits), dtype=torch.float32), requests)


def sample(logits: Iterable[Sequence[float]], requests: list[Request]) -> list[int]:
    result = step(logits, requests)
    assert not result.errors
    return result.token_ids


def seen(logits: Sequence[float], count: int = 2000, seed: int = 0, **params: Any) -> Counter[int]:
    """How often each token comes up, over 500 output positions of each of some seeds."""
    requests = [request(i % 500, seed=seed + i // 500, **params) for i in range(count)]
    return Counter(sample([logits] * count, requests))


# ---- greedy


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert sample([LOGITS], [request(temperature=0)]) == [2]


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_takes_the_lowest_id_among_equals(greedy: dict[str, Any]) -> None:
    rows = [[0.0, 7.0, 7.0, 7.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]]
    assert sample(rows, [request(**greedy)] * 3) == [1, 0, 3]


def test_greedy_ignores_the_other_parameters() -> None:
    row = request(temperature=0, top_k=2, top_p=0.1, min_p=0.9, seed=5)
    assert sample([LOGITS], [row]) == [2]


# ---- each parameter by its definition


def test_without_limits_every_token_comes_up() -> None:
    assert seen(LOGITS).keys() == {0, 1, 2, 3, 4}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert seen(LOGITS, top_k=2).keys() == {2, 0}
    assert seen(LOGITS, top_k=3).keys() == {2, 0, 3}


def test_top_k_keeps_all_tokens_that_tie_with_the_last() -> None:
    assert seen(LOGITS, top_k=4).keys() == {2, 0, 3, 1, 4}
    assert seen([1.0, 1.0, 1.0, 0.0], top_k=2).keys() == {0, 1, 2}


@pytest.mark.parametrize("top_k", [5, 6, 2**31 - 1])
def test_top_k_of_the_whole_vocabulary_or_more_limits_nothing(top_k: int) -> None:
    assert seen(LOGITS, top_k=top_k) == seen(LOGITS)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.74, {2, 0}),
        (0.76, {2, 0, 3}),
        (0.87, {2, 0, 3}),
        (0.88, {2, 0, 3, 1, 4}),  # one of the two would do: they tie
        (0.999999, {2, 0, 3, 1, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float, kept: set[int]) -> None:
    assert seen(LOGITS, top_p=top_p).keys() == kept


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.1, {0, 1, 2, 3, 4}), (0.13, {0, 2, 3}), (0.26, {0, 2}), (0.51, {2}), (1.0, {2})],
)
def test_min_p_drops_what_is_too_unlikely_beside_the_best(min_p: float, kept: set[int]) -> None:
    assert seen(LOGITS, min_p=min_p).keys() == kept


def test_min_p_of_one_keeps_all_that_tie_with_the_best() -> None:
    assert seen([3.0, 1.0, 3.0, 2.0], min_p=1.0).keys() == {0, 2}


def test_top_p_takes_its_share_of_what_top_k_left() -> None:
    # Of all the mass 0.6 needs two tokens; of the 0.75 that two tokens hold, one does.
    assert seen(LOGITS, top_p=0.6).keys() == {2, 0}
    assert seen(LOGITS, top_p=0.6, top_k=2).keys() == {2}


def test_top_p_takes_its_share_of_what_min_p_left() -> None:
    assert seen(LOGITS, top_p=0.6, min_p=0.3).keys() == {2}


def test_min_p_looks_at_probabilities_after_the_temperature() -> None:
    # At temperature 0.5 odds are squared: token 0 falls from 1/2 to 1/4 of token 2.
    assert seen(LOGITS, min_p=0.3).keys() == {0, 2}
    assert seen(LOGITS, min_p=0.3, temperature=0.5).keys() == {2}


def test_temperature_squares_or_roots_the_odds() -> None:
    cold, hot = seen(LOGITS, 8000, temperature=0.5), seen(LOGITS, 8000, temperature=2.0)
    assert cold[2] / cold[0] == pytest.approx(4, rel=0.1)
    assert hot[2] / hot[0] == pytest.approx(2**0.5, rel=0.1)


def test_tiny_temperatures_are_raised() -> None:
    close = [0.0, 0.005]
    assert seen(close, temperature=1e-300) == seen(close, temperature=MIN_TEMPERATURE)
    assert seen(close, temperature=1e-300).keys() == {0, 1}


def test_an_endless_temperature_is_uniform_over_what_is_possible() -> None:
    counts = seen([-math.inf, 50.0, -50.0], temperature=1e300)
    assert counts.keys() == {1, 2}
    assert 900 < counts[1] < 1100


# ---- min_tokens


def test_stop_tokens_cannot_be_chosen_before_min_tokens() -> None:
    stops = {"min_tokens": 2, "stop_token_ids": (2, 0)}
    for temperature in (0.0, 1.0):
        early = [request(p, temperature=temperature, **stops) for p in (0, 1)]
        assert not {0, 2} & set(sample([LOGITS] * 2, early))
    assert sample([LOGITS], [request(2, temperature=0, **stops)]) == [2]


def test_masked_stop_tokens_count_for_no_limit() -> None:
    counts = seen(LOGITS, top_k=1, min_tokens=10_000, stop_token_ids=(2,))
    assert counts.keys() == {0}
    counts = seen(LOGITS, top_p=0.5, min_tokens=10_000, stop_token_ids=(2,))
    assert counts.keys() == {0}


def test_only_the_rows_of_short_requests_are_masked() -> None:
    short = request(temperature=0, min_tokens=1, stop_token_ids=(2,))
    other = request(temperature=0, stop_token_ids=(2,))
    assert sample([LOGITS] * 3, [other, short, other]) == [2, 0, 2]


def test_stop_tokens_beyond_the_vocabulary_are_no_error() -> None:
    row = request(temperature=0, min_tokens=1, stop_token_ids=(5, 2, 2**31 - 1))
    assert sample([LOGITS], [row]) == [0]


# ---- a slow reference


def reference(logits: Sequence[float], one: Request, slack: float) -> int:
    """The definition in plain floating point. `slack` moves every border by a little."""
    params = one.params
    if params.top_k == 1:
        return logits.index(max(logits))
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    keep = [w >= min(params.min_p * (1 + slack), 1.0) for w in weights]
    if params.top_k > 0:
        border = sorted(weights, reverse=True)[: params.top_k][-1]
        keep = [k and w >= border for k, w in zip(keep, weights, strict=True)]
    if params.top_p < 1:
        kept = sorted((w for k, w in zip(keep, weights, strict=True) if k), reverse=True)
        mass = 0.0
        for border in kept:
            mass += border
            if mass >= params.top_p * sum(kept) * (1 + slack):
                break
        keep = [k and w >= border for k, w in zip(keep, weights, strict=True)]
    left = {token: w for token, (k, w) in enumerate(zip(keep, weights, strict=True)) if k}
    target = uniform(params.seed, one.num_output_tokens) * sum(left.values())
    for token, weight in left.items():
        target -= weight * (1 + slack)
        if target < 0:
            return token
    return max(left)


# A grid, so that ties are frequent and near-ties do not exist.
grid_logits = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=1, max_size=60)
grid_requests = st.builds(
    request,
    position=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([1.0]) | st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0]) | st.floats(0.0, 1.0),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=400, deadline=None)
@given(logits=grid_logits, one=grid_requests)
def test_the_token_is_the_one_the_definition_gives(logits: list[float], one: Request) -> None:
    expected = {reference(logits, one, slack) for slack in (-1e-5, 0.0, 1e-5)}
    assert sample([logits], [one])[0] in expected


# ---- statistics


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}])
def test_tokens_come_up_as_often_as_they_should(params: dict[str, float]) -> None:
    count = 20_000
    counts = seen(LOGITS, count, seed=11, **params)
    temperature = params.get("temperature", 1.0)
    weights = {token: math.exp(LOGITS[token] / temperature) for token in counts}
    chi_square = 0.0
    for token, times in counts.items():
        expected = count * weights[token] / sum(weights.values())
        chi_square += (times - expected) ** 2 / expected
    assert chi_square < 18.5  # at most 4 degrees of freedom: one in a thousand is above


def test_seeds_are_as_good_as_positions() -> None:
    requests = [request(seed=seed) for seed in range(20_000)]
    counts = Counter(sample([[0.0, 0.0, 0.0, 0.0]] * 20_000, requests))
    assert sum((counts[token] - 5000) ** 2 / 5000 for token in range(4)) < 16.3


# ---- same request, same answer


def mixed_requests(count: int) -> list[Request]:
    choose = random.Random(3)
    return [
        request(
            choose.randrange(100),
            temperature=choose.choice([0.0, 0.6, 1.0, 3.0]),
            top_k=choose.choice([0, 0, 1, 20, 5000]),
            top_p=choose.choice([1.0, 1.0, 0.3, 0.95]),
            min_p=choose.choice([0.0, 0.0, 0.05]),
            seed=choose.randrange(2**63),
            min_tokens=choose.choice([0, 50]),
            stop_token_ids=(7, 8, 9),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("vocab", "num_rows"), [(33, 64), (32_000, 40), (151_936, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_token_alone_and_in_any_batch(
    vocab: int, num_rows: int, dtype: torch.dtype
) -> None:
    logits = (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(5)) * 3).to(
        dtype
    )
    requests = mixed_requests(num_rows)
    alone = [
        Sampler().sample(logits[i : i + 1].clone(), [requests[i]]).token_ids[0]
        for i in range(num_rows)
    ]
    assert len(set(alone)) > 5
    shuffle = random.Random(8)
    for size in (2, 3, 7, num_rows // 2, num_rows):
        rows = shuffle.sample(range(num_rows), size)
        tokens = Sampler().sample(logits[rows], [requests[row] for row in rows]).token_ids
        assert tokens == [alone[row] for row in rows]


def test_softmax_of_a_row_has_the_same_bits_in_every_batch() -> None:
    # The sampler relies on this; the rest of its arithmetic is exact.
    logits = torch.randn(64, 10_007, generator=torch.Generator().manual_seed(6)) * 5
    alone = torch.cat([logits[i : i + 1].softmax(-1) for i in range(64)])
    for size in range(1, 65):
        assert torch.equal(logits[64 - size :].softmax(-1), alone[64 - size :])


def test_the_number_of_threads_does_not_change_a_token() -> None:
    logits = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(7))
    requests = mixed_requests(16)
    threads = torch.get_num_threads()
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(Sampler().sample(logits.clone(), requests).token_ids)
    torch.set_num_threads(threads)
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_size_of_blocks_and_heads_does_not_change_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(9))
    requests = mixed_requests(40)
    usual = Sampler().sample(logits.clone(), requests).token_ids
    for head in (1, 3, 64):
        monkeypatch.setattr(cutoff, "_HEAD", head)
        monkeypatch.setattr(torch_sampling, "_BLOCK_ELEMENTS", {"cpu": 500 * head})
        assert Sampler().sample(logits.clone(), requests).token_ids == usual


def test_limits_that_keep_the_same_tokens_choose_the_same_token() -> None:
    by_rank = seen(LOGITS, top_k=3, seed=4)
    assert by_rank.keys() == {2, 0, 3}
    assert seen(LOGITS, top_p=0.8, seed=4) == by_rank
    assert seen(LOGITS, min_p=0.2, seed=4) == by_rank
    assert seen([*LOGITS[:1], -math.inf, *LOGITS[2:4], -math.inf], seed=4) == by_rank


def test_seed_and_position_decide_the_token_for_ever() -> None:
    # 1 / 64 of the unit interval each: a change of the noise or of the walk shows at once.
    flat = [[0.0] * 64] * 8
    tokens = sample(flat, [request(position, seed=42) for position in range(8)])
    assert tokens == [int(uniform(42, position) * 64) for position in range(8)]
    assert tokens == [49, 61, 47, 36, 49, 49, 62, 48]
    assert sample(flat, [request(seed=seed) for seed in range(8)]) == [1, 60, 62, 2, 15, 26, 44, 29]


# ---- rows that are no distribution


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}])
def test_a_row_that_is_no_distribution_is_an_error_and_spoils_no_other(
    bad: float, params: dict[str, float]
) -> None:
    requests = [request(position, **params) for position in range(3)]
    expected = sample([LOGITS] * 3, requests)
    result = step([LOGITS, [0.0, bad, 9.0, bad, 0.0], LOGITS], requests)
    assert result.token_ids == [expected[0], -1, expected[2]]
    assert {index: error.kind for index, error in result.errors.items()} == {1: ErrorKind.LOGITS}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize("vocab_size", [5, 67, 300])
def test_one_bad_logit_is_found_wherever_it_stands(
    vocab_size: int, params: dict[str, Any], bad: float
) -> None:
    rows = torch.randn(vocab_size, vocab_size).fill_diagonal_(bad)
    result = step(rows.tolist(), [request(**params) for _ in range(vocab_size)])
    assert result.errors.keys() == set(range(vocab_size))
    assert all(error.is_corrupted for error in result.errors.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_found_where_its_token_is_forced(bad: float) -> None:
    forced = request(adjustments=LogitAdjustments(forced_token_ids=(1,)))
    ending = request(
        adjustments=LogitAdjustments(thinking=ThinkingBudget(0, (0,), (2,))),
    )
    good = step([LOGITS, LOGITS], [forced, ending])
    assert (good.token_ids, good.errors) == ([1, 2], {})
    rows = [[0.0, 1.0, 2.0, bad, 0.0], [0.0, 1.0, 2.0, bad, 0.0]]
    if bad < 0:
        rows = [[bad] * 5, LOGITS]
    result = step(rows, [forced, ending])
    assert result.errors.keys() == ({0} if bad < 0 else {0, 1})
    assert all(error.is_corrupted for error in result.errors.values())


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 1}])
def test_a_row_without_a_possible_token_is_an_error(params: dict[str, Any]) -> None:
    result = step([[-math.inf] * 5, LOGITS], [request(**params), request(temperature=0)])
    assert result.token_ids == [-1, 2]
    assert result.errors.keys() == {0}
    assert "no token is possible" in result.errors[0].message


def test_impossible_tokens_are_never_chosen() -> None:
    row = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    assert seen(row).keys() == {1, 3}
    assert seen(row, top_k=4).keys() == {1, 3}


def test_noise_at_the_ends_of_the_unit_interval_chooses_possible_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = [-math.inf, 1.0, 1.3, 0.2, -math.inf]
    for noise, token in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, noise=noise: noise)
        assert sample([row], [request()]) == [token]


# ---- shapes and devices


def test_an_empty_batch_yields_nothing() -> None:
    assert Sampler().sample(torch.empty(0, 10), []).token_ids == []


def test_a_vocabulary_of_one_token_has_no_choice() -> None:
    requests = [request(), request(temperature=0), request(top_p=0.1), request(top_k=3)]
    assert sample([[3.0]] * 4, requests) == [0, 0, 0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_what_the_cpu_chooses() -> None:
    requests = mixed_requests(200)
    logits = torch.tensor([LOGITS] * 200)
    tokens = Sampler().sample(logits.cuda(), requests).token_ids
    assert tokens == Sampler().sample(logits, requests).token_ids


# ---- what requests ask for beside a token


def special(token_ids: Sequence[int] = (), key: int = 0, **params: Any) -> Request:
    """A request with an output of its own."""
    one = request(0, **params)
    one.key = key
    one.token_ids += token_ids
    return one


def test_adjusted_rows_are_drawn_from_and_their_neighbours_are_not_touched() -> None:
    plain = [request(temperature=0), request(5, seed=3)]
    biased = special(temperature=0, adjustments=LogitAdjustments(logit_bias={4: 9.0}))
    banned = special(adjustments=LogitAdjustments(allowed_token_ids=(1, 3)), key=1)
    result = step([LOGITS] * 4, [plain[0], biased, plain[1], banned])
    assert result.token_ids[:3:2] == sample([LOGITS] * 2, plain)
    assert result.token_ids[1] == 4
    assert result.token_ids[3] in {1, 3}
    assert not result.errors


def test_adjusted_rows_are_drawn_as_often_as_they_should() -> None:
    count, penalised = 20_000, LogitAdjustments(repetition_penalty=2.0, logit_bias={4: -1.0})
    requests = [request(seed=i, adjustments=penalised) for i in range(count)]
    for key, one in enumerate(requests):
        one.key = key
    counts = Counter(sample([LOGITS] * count, requests))
    row = [2 * LOGITS[0], *LOGITS[1:4], LOGITS[4] - 1.0]  # token 0 is all there is in the prompt
    total = sum(map(math.exp, row))
    chi_square = 0.0
    for token, logit in enumerate(row):
        expected = count * math.exp(logit) / total
        chi_square += (counts[token] - expected) ** 2 / expected
    assert chi_square < 18.5


def test_one_row_fails_and_the_others_have_their_tokens() -> None:
    impossible = LogitAdjustments(allowed_token_ids=(2,), bad_words=((2,),))
    no_processor = LogitAdjustments(processors=(ProcessorCall(0, {}),))
    rows = [
        request(temperature=0),
        special(adjustments=impossible, temperature=0),
        special(adjustments=no_processor, key=1),
        special(adjustments=LogitAdjustments(logit_bias={2: -9.0}), temperature=0, key=2),
    ]
    result = step([LOGITS] * 4, rows)
    assert (result.token_ids[0], result.token_ids[3]) == (2, 0)
    kinds = {index: error.kind for index, error in result.errors.items()}
    assert kinds == {1: ErrorKind.LOGITS, 2: ErrorKind.PROCESSOR}
    assert "allowed_token_ids, bad_words" in result.errors[1].message


def test_masks_that_leave_nothing_are_named_beside_rows_that_were_broken() -> None:
    impossible = special(adjustments=LogitAdjustments(bad_words=tuple((i,) for i in range(5))))
    result = step([LOGITS, [math.nan] * 5], [impossible, request()])
    assert "bad_words" in result.errors[0].message
    assert "NaN" in result.errors[1].message


def test_a_forced_token_needs_no_possible_one() -> None:
    forced = LogitAdjustments(forced_token_ids=(3,), allowed_token_ids=(0,), bad_words=((0,),))
    result = step([LOGITS], [special(adjustments=forced)])
    assert (result.token_ids, result.errors) == ([3], {})


class OneByOne:
    """A grammar of token 1, then 3, and no more."""

    def __init__(self) -> None:
        self.position = 0

    def start(self) -> "OneByOne":
        return OneByOne()

    def advance(self, token_ids: Sequence[int]) -> bool:
        for token_id in token_ids:
            assert token_id == (1, 3)[self.position]
            self.position += 1
        return self.position == 2

    def fill_mask(self, mask: Any) -> None:
        mask[:] = 1 << (1, 3)[self.position]


MANY = {"top_k": 5, "top_p": 0.7, "min_p": 0.05, "temperature": 1.7}


class SomeOf:
    """A grammar of these tokens, again and again."""

    def __init__(self, *token_ids: int) -> None:
        self._token_ids = token_ids

    def start(self) -> "SomeOf":
        return self

    def advance(self, token_ids: Sequence[int]) -> bool:
        return False

    def fill_mask(self, mask: Any) -> None:
        mask[:] = 0
        for token_id in self._token_ids:
            mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.8}, MANY])
def test_among_few_tokens_the_choice_is_that_of_a_whole_row(params: dict[str, Any]) -> None:
    """Where a grammar leaves few, only their logits are looked at: beside rows that it leaves
    many, and rows without one."""
    dice = random.Random(str(params))
    vocab = 400
    for position in range(50):
        rows = [[dice.gauss(0, 2) for _ in range(vocab)] for _ in range(4)]
        few, many = dice.sample(range(30), 9), range(1, vocab)
        bound = [request(position, seed=row, **params) for row in range(4)]
        for key, each in enumerate(bound):
            each.key = key
        bound[0].grammar, bound[2].grammar = SomeOf(*few), SomeOf(*many)
        tokens = sample(rows, bound)
        for row, allowed in ((0, set(few)), (1, set(range(vocab))), (2, set(many))):
            masked = [x if i in allowed else -math.inf for i, x in enumerate(rows[row])]
            assert [tokens[row]] == sample([masked], [request(position, seed=row, **params)])


def test_a_grammar_rules_a_row_and_says_when_it_is_complete() -> None:
    chooser = Sampler()
    free, bound = special(temperature=0), special(temperature=0, key=1)
    bound.grammar = OneByOne()
    for token_id, complete in ((1, set()), (3, {1})):
        chooser.prepare([free, bound], 5)
        result = chooser.sample(torch.tensor([LOGITS] * 2), [free, bound])
        assert (result.token_ids, result.complete) == ([2, token_id], complete)
        bound.token_ids.append(token_id)
        free.token_ids.append(2)
    chooser.forget([1])
    assert len(chooser._rows) == 0


@pytest.mark.parametrize("mode", LogprobsMode)
def test_logprobs_are_of_the_token_that_was_drawn(mode: LogprobsMode) -> None:
    requests = [
        request(i % 10, seed=i, logprobs=LogprobsRequest(2, (4,), mode=mode), top_k=3)
        for i in range(50)
    ]
    result = step([LOGITS] * 50, requests)
    for index, token_id in enumerate(result.token_ids):
        scored = result.logprobs[index]
        ids = torch.frombuffer(bytearray(scored.token_ids), dtype=torch.int32).tolist()
        scores = torch.frombuffer(bytearray(scored.logprobs), dtype=torch.float32).tolist()
        assert ids == [token_id, 2, 0, 4]
        assert (scored.position, scored.ranks) == (index % 10, [1 + (2, 0, 3).index(token_id)])
        if mode in (LogprobsMode.RAW_LOGPROBS, LogprobsMode.RAW_LOGITS):
            assert scores == pytest.approx([LOGITS[i] for i in ids], abs=1e-6)
        else:
            # Of the kept three, with 7 / 8 of the mass.
            shift = math.log(7 / 8) if mode is LogprobsMode.PROCESSED_LOGPROBS else 0.0
            expected = [LOGITS[i] - shift if i in (0, 2, 3) else -math.inf for i in ids]
            assert scores == pytest.approx(expected, abs=1e-6)


def test_asking_for_logprobs_changes_no_token() -> None:
    requests = mixed_requests(60)
    logits = torch.randn(60, 3000, generator=torch.Generator().manual_seed(4)) * 3
    expected = Sampler().sample(logits.clone(), requests).token_ids
    for mode in LogprobsMode:
        for key, one in enumerate(requests):
            one.key = key
            wanted = LogprobsRequest(3, mode=mode)
            one.params = msgspec.structs.replace(one.params, logprobs=wanted)
        result = Sampler().sample(logits.clone(), requests)
        assert result.token_ids == expected
        assert result.logprobs.keys() == set(range(60))


def test_the_drawn_token_is_possible_in_processed_logprobs() -> None:
    wanted = LogprobsRequest(0, mode=LogprobsMode.PROCESSED_LOGPROBS)
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(2)) * 1e-3
    requests = [
        request(i, seed=i, top_p=0.5, top_k=2000, min_p=0.99, logprobs=wanted) for i in range(200)
    ]
    result = Sampler().sample(logits, requests)
    for scored in result.logprobs.values():
        (score,) = torch.frombuffer(bytearray(scored.logprobs), dtype=torch.float32).tolist()
        assert math.isfinite(score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_rows_are_the_same_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    requests = mixed_requests(40)
    for key, one in enumerate(requests):
        one.key = key
        one.params = msgspec.structs.replace(
            one.params,
            adjustments=LogitAdjustments(0.5, 0.1, 1.2, {3: 2.0}) if key % 2 else None,
            logprobs=LogprobsRequest(3, (1,), mode=LogprobsMode(key % 4)) if key % 3 else None,
        )
    logits = (torch.randn(40, 20_011, generator=torch.Generator().manual_seed(5)) * 3).to(dtype)
    alone = [Sampler().sample(logits[i : i + 1].clone(), [requests[i]]) for i in range(40)]
    shuffle = random.Random(8)
    for size in (2, 7, 40):
        rows = shuffle.sample(range(40), size)
        together = Sampler().sample(logits[rows], [requests[row] for row in rows])
        assert together.token_ids == [alone[row].token_ids[0] for row in rows]
        for index, row in enumerate(rows):
            assert together.logprobs.get(index) == alone[row].logprobs.get(0)


def test_rows_that_travel_come_back_to_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed_requests(30)
    for key, one in enumerate(requests):
        one.key = key
        if key % 3:
            own = LogitAdjustments(logit_bias={key: 9.0}, repetition_penalty=1.5)
            one.params = msgspec.structs.replace(
                one.params, adjustments=own, logprobs=LogprobsRequest(3)
            )
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(5))
    in_place = Sampler().sample(logits.clone(), requests)
    monkeypatch.setattr(sampler, "IN_PLACE", frozenset())
    assert Sampler().sample(logits.clone(), requests) == in_place


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_special_rows_travel_to_the_host_and_back() -> None:
    adjustments = LogitAdjustments(logit_bias={4: 9.0})
    requests = [
        request(temperature=0),
        special(temperature=0, adjustments=adjustments, logprobs=LogprobsRequest(2)),
        request(seed=3),
    ]
    logits = torch.tensor([LOGITS] * 3)
    result = Sampler().sample(logits.cuda(), requests)
    assert result == Sampler().sample(logits, requests)
    assert result.token_ids[1] == 4
