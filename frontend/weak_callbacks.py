"""Callbacks for those that live longer than whoever is called: the event loop, above all."""

import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def weakly(method: Callable[[T], None]) -> Callable[[T], None]:
    """A callback that does not keep the method's object alive; without that it does nothing."""
    reference = weakref.WeakMethod(method)

    def call(argument: T) -> None:
        if (target := reference()) is not None:
            target(argument)

    return call
