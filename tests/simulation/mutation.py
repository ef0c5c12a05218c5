"""One-line mistakes, made in the code that is running."""

import inspect
import textwrap
from typing import Any, NamedTuple

import pytest


class Mutant(NamedTuple):
    """A function, and a part of its source that is replaced."""

    owner: Any
    name: str
    old: str
    new: str

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the mistake, for this test alone."""
        function = getattr(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, "the code has changed: change the mutant with it"
        namespace: dict[str, Any] = {}
        exec(source.replace(self.old, self.new), function.__globals__, namespace)
        monkeypatch.setattr(self.owner, self.name, namespace[self.name])
