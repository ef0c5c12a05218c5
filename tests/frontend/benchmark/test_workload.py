"""A workload is a pure function of its description: same seed, same work."""

import dataclasses
import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from footplate.frontend.benchmark.workload import (
    FIRST_TOKEN_ID,
    LengthRange,
    Workload,
    arrival_times,
    make_work,
)

WORKLOAD = Workload(
    num_prompts=50, input_len=LengthRange(10, 20), output_len=LengthRange(5, 5), seed=3
)


def replace(**changes: object) -> Workload:
    return dataclasses.replace(WORKLOAD, **changes)  # type: ignore[arg-type]


def test_a_length_is_one_number_or_a_range() -> None:
    assert LengthRange.parse("128") == LengthRange(128, 128)
    assert LengthRange.parse("64:256") == LengthRange(64, 256)


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "9:3", "1:2:3", "4.5", "0:7"])
def test_other_lengths_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|positive"):
        LengthRange.parse(text)


def test_the_same_description_gives_the_same_work() -> None:
    assert make_work(WORKLOAD, 2048) == make_work(WORKLOAD, 2048)
    assert make_work(WORKLOAD, 2048) != make_work(replace(seed=4), 2048)


def test_lengths_stay_in_their_range_and_reach_both_ends() -> None:
    work = make_work(replace(num_prompts=400), 2048)
    assert {len(item.prompt_token_ids) for item in work} == set(range(10, 21))
    assert {item.max_tokens for item in work} == {5}
    assert max(len(item.prompt_token_ids) + item.max_tokens for item in work) == WORKLOAD.max_len


def test_every_prompt_begins_with_the_shared_prefix_and_goes_on_differently() -> None:
    work = make_work(replace(prefix_len=30), 2048)
    assert len({tuple(item.prompt_token_ids[:30]) for item in work}) == 1
    assert len({tuple(item.prompt_token_ids[30:40]) for item in work}) == len(work)
    assert all(len(item.prompt_token_ids) >= 40 for item in work)


def test_rate_and_prefix_do_not_change_the_prompts() -> None:
    plain = [item.prompt_token_ids for item in make_work(WORKLOAD, 2048)]
    assert [item.prompt_token_ids for item in make_work(replace(request_rate=5), 2048)] == plain
    behind = [item.prompt_token_ids[8:] for item in make_work(replace(prefix_len=8), 2048)]
    assert behind == plain


def test_more_prompts_begin_with_the_same_ones() -> None:
    assert make_work(replace(num_prompts=80), 2048)[:50] == make_work(WORKLOAD, 2048)


@pytest.mark.parametrize("vocab_size", [7, 600, 151_936])
def test_token_ids_are_in_the_vocabulary_and_not_special(vocab_size: int) -> None:
    ids = {i for item in make_work(WORKLOAD, vocab_size) for i in item.prompt_token_ids}
    assert max(ids) < vocab_size
    assert min(ids) >= (FIRST_TOKEN_ID if vocab_size > 600 else 0)


def test_without_a_rate_everything_is_sent_at_once() -> None:
    assert {item.send_at_s for item in make_work(WORKLOAD, 2048)} == {0.0}


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.01, 1000),
    burstiness=st.floats(0.1, 100),
    seed=st.integers(),
)
def test_arrivals_ascend_from_zero_at_the_asked_rate(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(count, rate, burstiness, random.Random(seed))
    assert len(times) == count
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx((count - 1) / rate)


def test_burstiness_shapes_the_gaps() -> None:
    def variation(burstiness: float) -> float:
        times = arrival_times(5000, 10.0, burstiness, random.Random(1))
        gaps = [after - before for before, after in pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert variation(1.0) == pytest.approx(1.0, abs=0.1)  # Poisson
    assert variation(4.0) == pytest.approx(0.5, abs=0.05)
    assert variation(0.25) == pytest.approx(2.0, abs=0.2)


def test_one_request_arrives_at_once_whatever_the_rate() -> None:
    assert arrival_times(1, 0.001, 1.0, random.Random(0)) == [0.0]
    assert arrival_times(0, math.inf, 1.0, random.Random(0)) == []


@pytest.mark.parametrize(
    "field",
    [{"num_prompts": 0}, {"request_rate": 0.0}, {"request_rate": -1.0}, {"burstiness": 0.0}],
    ids=str,
)
def test_work_that_cannot_be_is_refused_by_name(field: dict[str, float]) -> None:
    (name,) = field
    options: dict[str, Any] = {"num_prompts": 1, **field}
    with pytest.raises(ValueError, match=f"{name}=.*must be above 0"):
        Workload(input_len=LengthRange(1, 1), output_len=LengthRange(1, 1), **options)
