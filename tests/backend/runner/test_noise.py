"""The noise is the same forever, uniform, and independent between places."""

import itertools
import statistics

import pytest

from footplate.backend.runner.noise import uniform

# What a seed means is part of the interface.
GOLDEN = {
    (0, 0): "0x1.26632760c4060p-6",
    (0, 1): "0x1.6bca15560c668p-4",
    (1, 0): "0x1.e74e5eeee9dbfp-1",
    (42, 1000): "0x1.2c789309ebbf9p-1",
    (9223372036854775807, 2147483647): "0x1.fdb551d4fab24p-2",
    (18446744073709551615, 0): "0x1.a8ebd12275651p-1",
}


@pytest.mark.parametrize(("place", "value"), GOLDEN.items())
def test_noise_never_changes(place: tuple[int, int], value: str) -> None:
    assert uniform(*place).hex() == value


def test_noise_is_a_multiple_of_two_to_the_minus_53_below_one() -> None:
    for seed, position in itertools.product(range(30), range(30)):
        scaled = uniform(seed, position) * 2**53
        assert scaled == int(scaled)
        assert 0 <= scaled < 2**53


def test_noise_does_not_depend_on_what_was_drawn_before() -> None:
    forward = [uniform(7, position) for position in range(50)]
    backward = [uniform(7, position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 50


def test_seed_and_position_are_not_interchangeable() -> None:
    assert uniform(3, 5) != uniform(5, 3)


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_noise_is_uniform(along: str) -> None:
    count, num_bins = 64_000, 64
    bins = [0] * num_bins
    for i in range(count):
        noise = uniform(1, i) if along == "positions" else uniform(i, 1)
        bins[int(noise * num_bins)] += 1
    expected = count / num_bins
    chi_square = sum((seen - expected) ** 2 / expected for seen in bins)
    assert chi_square < 103.4  # 63 degrees of freedom: one in a thousand is above


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_neighbours_are_uncorrelated(along: str) -> None:
    noise = [uniform(1, i) if along == "positions" else uniform(i, 1) for i in range(20_000)]
    for lag in (1, 2, 16):
        # The standard deviation of the correlation of independent numbers is 1 / sqrt(20000).
        assert abs(statistics.correlation(noise[:-lag], noise[lag:])) < 4 / 20_000**0.5
