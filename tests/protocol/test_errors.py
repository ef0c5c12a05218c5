"""The tree that `errors.py` draws is the tree of its classes."""

import inspect
import re

from footplate.protocol import errors

# "  - InvalidRequestError (ValueError)   the caller's fault"
DRAWN = re.compile(r"^(?P<indent> *)[*+.-] (?P<name>\w+)(?: \((?P<other>\w+)\))?", re.MULTILINE)


def read_drawing(docstring: str) -> dict[str, set[str]]:
    """Each drawn class with its bases."""
    path: list[tuple[int, str]] = []
    bases: dict[str, set[str]] = {}
    for match in DRAWN.finditer(docstring):
        indent, name, other = len(match["indent"]), match["name"], match["other"]
        while path and path[-1][0] >= indent:
            path.pop()
        bases[name] = {path[-1][1] if path else "Exception", *([other] if other else [])}
        path.append((indent, name))
    return bases


def test_the_drawn_tree_is_the_tree_of_classes() -> None:
    real = {
        name: {base.__name__ for base in kind.__bases__}
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }
    assert errors.__doc__ is not None
    assert read_drawing(errors.__doc__) == real


def test_the_reader_of_drawings_sees_indentation_and_second_bases() -> None:
    drawing = "* A\n  - B (ValueError)   words - and * signs\n    + C\n  - D\n"
    expected = {"A": {"Exception"}, "B": {"A", "ValueError"}, "C": {"B"}, "D": {"A"}}
    assert read_drawing(drawing) == expected


def test_every_error_says_what_it_means() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert kind.__doc__


def test_whoever_catches_value_errors_catches_every_refused_request() -> None:
    for kind in (errors.PromptTooLongError, errors.DuplicateRequestError):
        assert issubclass(kind, ValueError)
    assert not issubclass(errors.RequestFailedError, ValueError)
