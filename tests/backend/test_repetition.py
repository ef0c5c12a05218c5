"""Outputs that go round in circles, against the definition and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from footplate.backend.repetition import RepetitionDetector
from footplate.protocol.token_params import RepetitionDetection


def ends_repetitively(output: list[int], wanted: RepetitionDetection) -> bool:
    """The definition."""
    return any(
        len(output) >= wanted.min_count * size
        and output[len(output) - wanted.min_count * size :] == output[-size:] * wanted.min_count
        for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1)
    )


@pytest.mark.parametrize(
    ("output", "max_size", "min_size", "count", "stops_after"),
    [
        ([7, 7, 7, 7], 1, 1, 2, 2),
        ([7, 7, 7, 7], 1, 1, 4, 4),
        ([7, 7, 7], 1, 1, 4, None),
        ([1, 2, 1, 2, 1, 2], 2, 2, 3, 6),
        ([1, 2, 1, 2, 1, 2], 1, 1, 2, None),  # the pattern is longer than what is looked for
        ([7, 7, 7, 7], 2, 2, 2, 4),  # a pattern may repeat itself inside
        ([9, 1, 2, 3, 1, 2, 3], 3, 1, 2, 7),  # what stands before it does not matter
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, 1, 2, None),  # one token is another
        ([5, 1, 1], 4, 1, 2, 3),
    ],
)
def test_the_request_ends_when_a_pattern_has_been_said_often_enough(
    output: list[int], max_size: int, min_size: int, count: int, stops_after: int | None
) -> None:
    detector = RepetitionDetector(RepetitionDetection(max_size, min_size, count))
    stops = [place for place, token_id in enumerate(output, 1) if detector.advance(token_id)]
    assert (stops[0] if stops else None) == stops_after


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted)
outputs = st.lists(st.integers(0, 1), max_size=40) | st.lists(st.integers(0, 3), max_size=40)


@given(outputs, sizes, st.integers(2, 4), st.integers(0, 40))
def test_every_prefix_is_judged_by_the_definition_whatever_was_there_before(
    output: list[int], size: list[int], count: int, num_prior: int
) -> None:
    wanted = RepetitionDetection(size[1], size[0], count)
    prior = output[:num_prior]
    detector = RepetitionDetector(wanted, prior)
    assert detector.is_repeating == ends_repetitively(prior, wanted)
    for end in range(len(prior) + 1, len(output) + 1):
        expected = ends_repetitively(output[:end], wanted)
        assert detector.advance(output[end - 1]) == expected == detector.is_repeating


def test_a_long_prior_output_is_taken_up_in_linear_time() -> None:
    # Compared at every place, this would be half a billion comparisons.
    detector = RepetitionDetector(RepetitionDetection(1024, 1, 2**31 - 1), [5] * 100_000)
    assert not detector.is_repeating
