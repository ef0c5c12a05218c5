"""Stop strings: what matches, what is held back, and that chunks do not matter."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from footplate.frontend.text import StopStrings
from footplate.protocol.errors import InvalidParameterError

# Two letters make stop strings overlap all the time.
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
TEXT = st.text("abc", max_size=16)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where, and what: the definition, written down without any cleverness."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


def num_held_back(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that could still become a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ),
        default=0,
    )


def run(stops: list[str], chunks: list[str], include: bool = False) -> tuple[str, str | None]:
    searcher = StopStrings(stops, include)
    shown = ""
    for chunk in chunks:
        text, stop = searcher.feed(chunk)
        shown += text
        if stop is not None:
            return shown + searcher.finish(), stop
    return shown + searcher.finish(), None


def all_chunkings(text: str) -> list[list[str]]:
    if not text:
        return [[]]
    return [
        [text[:length], *rest]
        for length in range(1, len(text) + 1)
        for rest in all_chunkings(text[length:])
    ]


@given(STOPS, TEXT, st.booleans(), st.data())
@example(["aab", "ab"], "aaab", False, None)
def test_any_chunking_gives_what_the_definition_says(
    stops: list[str], text: str, include: bool, data: st.DataObject | None
) -> None:
    match = first_match(text, stops)
    expected: tuple[str, str | None] = (text, None)
    if match is not None:
        end, stop = match
        expected = (text[: end if include else end - len(stop)], stop)
    if len(text) <= 7:
        for chunks in all_chunkings(text):
            assert run(stops, chunks, include) == expected
    assert data is not None or len(text) <= 7
    if data is not None:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert run(stops, chunks, include) == expected


@given(STOPS, TEXT, TEXT, st.booleans())
@example(["ab"], "a", "b", False)
@example(["ab"], "ab", "c", False)
def test_a_stop_string_may_begin_where_none_may_be_complete(
    stops: list[str], before: str, text: str, include: bool
) -> None:
    searcher = StopStrings(stops, include)
    shown, matched = searcher.feed(before, may_match=False)
    assert matched is None
    more, matched = searcher.feed(text)
    ends = range(len(before) + 1, len(before) + len(text) + 1)
    whole = before + text
    complete = [(end, stop) for end in ends for stop in stops if whole[:end].endswith(stop)]
    expected: tuple[str, str | None] = (whole, None)
    if complete:
        end, stop = min(complete, key=lambda found: (found[0], -len(found[1])))
        expected = (whole[: end if include else end - len(stop)], stop)
    assert (shown + more + searcher.finish(), matched) == expected


@given(STOPS, TEXT)
def test_no_more_is_held_back_than_could_still_become_a_stop_string(
    stops: list[str], text: str
) -> None:
    searcher = StopStrings(stops)
    shown = ""
    for position, char in enumerate(text, start=1):
        delta, stop = searcher.feed(char)
        if stop is not None:
            return
        shown += delta
        assert shown == text[: position - num_held_back(text[:position], stops)]


def test_a_stop_string_across_three_chunks_is_found() -> None:
    assert run(["<stop>"], ["one <st", "o", "p> two"]) == ("one ", "<stop>")


def test_the_stop_string_completed_first_wins_whatever_the_order() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert run(["bc", "abcd"], ["abcd"]) == ("a", "bc")


def test_of_two_completed_together_the_longer_wins() -> None:
    assert run(["c", "bc"], ["abcd"]) == ("a", "bc")
    assert run(["bc", "c"], ["abcd"]) == ("a", "bc")


def test_the_stop_string_is_shown_only_when_asked_for() -> None:
    assert run(["END"], ["the END."]) == ("the ", "END")
    assert run(["END"], ["the END."], include=True) == ("the END", "END")


def test_text_that_did_not_become_a_stop_string_is_released() -> None:
    searcher = StopStrings(["\n\nHuman:"])
    assert searcher.feed("Yes.\n") == ("Yes.", None)
    assert searcher.feed("\nNo.") == ("\n\nNo.", None)
    assert searcher.feed("\n\nHum") == ("", None)
    assert searcher.finish() == "\n\nHum"


def test_after_a_match_nothing_is_left() -> None:
    searcher = StopStrings(["b"])
    assert searcher.feed("abb") == ("a", "b")
    assert searcher.finish() == ""
    with pytest.raises(AssertionError):
        searcher.feed("c")


def test_without_stop_strings_everything_passes() -> None:
    searcher = StopStrings([])
    assert searcher.feed("anything") == ("anything", None)
    assert searcher.finish() == ""


def test_a_long_stop_string_is_not_copied_with_every_character() -> None:
    # 100 000 characters held back: quadratic time would be minutes, not milliseconds.
    stop = "a" * 100_000 + "b"
    searcher = StopStrings([stop])
    assert all(searcher.feed("a") == ("", None) for _ in range(100_000))
    assert searcher.feed("a") == ("a", None)
    assert searcher.feed("b") == ("", stop)


@pytest.mark.parametrize("stops", ["stop", [""], ["a", ""], [b"a"], [1]])
def test_stop_strings_that_cannot_be_meant_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidParameterError, match="stop"):
        StopStrings(stops)
