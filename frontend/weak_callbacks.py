"""Callbacks for those that live longer than whoever is called: the event loop, above all."""

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def weakly(method: Callable[[T], None]) -> Callable[[T], None]:
    """A callback that does not keep the method's object alive; without that it does nothing."""
    reference = weakref.WeakMethod(method)

    def call(argument: T) -> None:
        if (target := reference()) is not None:
            target(argument)

    return call


def weakly_soon(method: Callable[[T], None]) -> Callable[[T], None]:
    """As `weakly`, for other threads: the method is called by the event loop that runs now."""
    loop, call = asyncio.get_running_loop(), weakly(method)

    def call_soon(argument: T) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(call, argument)

    return call_soon
