"""What people are told of an error, who must not learn where a process keeps its things."""

from pathlib import Path

import pytest

from footplate.backend.cause import MAX_CHARS, describe_cause
from footplate.backend.termination import Terminated


class Thing:
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("shapes 3 and 4"), "ValueError: shapes 3 and 4"),
        (KeyError("lost"), "KeyError: 'lost'"),
        (ValueError(), "ValueError"),
        (RuntimeError("one\n  two\tthree"), "RuntimeError: one two three"),
        (ValueError("1/2 and/or 3 / 4"), "ValueError: 1/2 and/or 3 / 4"),
        (OSError("no /usr/lib/x.so, '/etc/y': gone"), "OSError: no <path>, '<path>': gone"),
        (OSError("in (~/a) or ../b or ./c"), "OSError: in (<path>) or <path> or <path>"),
        (OSError("ipc:///run/a.sock and tcp://h:1"), "OSError: <address> and <address>"),
        (OSError("127.0.0.1:8000 or 10.0.0.1"), "OSError: <address> or <address>"),
        (ValueError("at 0x7f00deadbeef"), "ValueError: at <address>"),
        (ValueError(Thing()), "ValueError: <object>"),
        (ValueError("pid 123, process=45"), "ValueError: pid <id>, process=<id>"),
    ],
)
def test_causes_are_one_line_without_places(error: Exception, words: str) -> None:
    assert describe_cause(error) == words


def test_a_long_cause_is_cut() -> None:
    words = describe_cause(ValueError("x" * 10_000))
    assert len(words) == len("ValueError: ") + MAX_CHARS and words.endswith("...")


class UnspeakableError(Exception):
    def __init__(self, by: type[BaseException]) -> None:
        self.by = by

    def __str__(self) -> str:
        raise self.by(3)


@pytest.mark.parametrize("by", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_error_that_cannot_speak_is_named(by: type[BaseException]) -> None:
    assert describe_cause(UnspeakableError(by)) == "UnspeakableError"


def test_the_end_of_the_process_is_not_held_up() -> None:
    with pytest.raises(Terminated):
        describe_cause(UnspeakableError(Terminated))


def test_an_error_of_the_system_is_told_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "nothing").read_bytes()
    words = "FileNotFoundError: [Errno 2] No such file or directory: '<path>'"
    assert describe_cause(caught.value) == words
