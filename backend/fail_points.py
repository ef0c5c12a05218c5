"""Places in the engine core where a test makes something go wrong.

`FOOTPLATE_FAIL_POINTS` in the environment of the core holds rules, separated by semicolons:

    core.step:segfault@9                the process dies in its ninth step
    runner.execute:raise#777            every step fails that a request takes part in whose prompt
                                        holds token 777
    runner.execute:hang#777@2           the second such step never ends
    runner.execute:sleep=0.005;core.outputs:exit=12@40+

A rule is a place, an action, and which passages count: with `#token` those with a marked request;
with `@k` the k-th of them alone, with `@k+` that one and all later ones, else all. Passages are
counted in each process by itself. A child inherits the environment when it is started, so a test
that wants the next core to be healthy unsets the variable when the first one is up.

Places, in the order in which a core comes to them:

    start.begun                 configured; nothing is taken yet
    start.bound                 the address is taken, nothing is loaded
    start.importing_torch       phases of loading a real model, as `Progress` names them
    start.loading_weights
    start.checking_attention
    start.packing_weights
    start.allocating_KV_cache
    start.warming_up
    start.loaded                the model is there, nobody has been told
    inbox.receive               a message has come; on the inbox's thread
    core.step                   a step is planned
    runner.execute              it is on record who takes part, and the model runner is about to
                                compute the step, or a part of one that has failed
    core.outputs                a step is over, its outputs are about to be sent
    core.sent                   they have been sent

Actions:

    raise           RuntimeError
    oom             MemoryError
    sleep=seconds
    hang            computes for ever; other threads get their turns
    hang_gil        waits for ever in C and keeps the interpreter's lock
    stop            SIGSTOP
    kill            SIGKILL
    segfault        reads address 0
    exit=status     ends at once, with nothing tidied up

Without the variable `ENABLED` is False, and each place costs a step one look at it.
"""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from footplate.backend.request import Request

VARIABLE = "FOOTPLATE_FAIL_POINTS"

PLACES = (
    "start.begun",
    "start.bound",
    "start.importing_torch",
    "start.loading_weights",
    "start.checking_attention",
    "start.packing_weights",
    "start.allocating_KV_cache",
    "start.warming_up",
    "start.loaded",
    "inbox.receive",
    "core.step",
    "runner.execute",
    "core.outputs",
    "core.sent",
)

_RULE = re.compile(
    r"(?P<place>[\w.]+):(?P<action>\w+)(=(?P<argument>[\d.]+))?"
    r"(#(?P<token>\d+))?(@(?P<passage>\d+)(?P<onwards>\+?))?"
)


@dataclass(slots=True)
class FailPoint:
    """One rule, and how often it has been passed.

    Attributes:
        token: only passages count with a request whose prompt holds it; None counts all.
        first: the passage at which it acts for the first time; the first one is 1.
        last: and for the last time; None is for ever.
    """

    place: str
    act: Callable[[], None]
    token: int | None = None
    first: int = 1
    last: int | None = None
    num_passages: int = 0

    def pass_by(self, requests: Sequence[Request]) -> None:
        """Count a passage, and act if it is time."""
        if self.token is not None and not any(_holds(each, self.token) for each in requests):
            return
        self.num_passages += 1
        if self.first <= self.num_passages <= (self.last or self.num_passages):
            self.act()


def _holds(request: Request, token: int) -> bool:
    return token in request.token_ids[: request.num_prompt_tokens]


def parse(text: str) -> list[FailPoint]:
    """Rules as they stand in the environment. Raises ValueError for one that makes no sense."""
    return [_parse_rule(rule.strip()) for rule in text.split(";") if rule.strip()]


def _parse_rule(rule: str) -> FailPoint:
    match = _RULE.fullmatch(rule)
    if match is None:
        raise ValueError(f"{VARIABLE}: {rule!r} is not place:action[=x][#token][@k[+]]")
    if match["place"] not in PLACES:
        raise ValueError(f"{VARIABLE}: there is no place {match['place']!r}, but {PLACES}")
    first = int(match["passage"] or 1)
    return FailPoint(
        place=match["place"],
        act=_action(match["action"], match["argument"]),
        token=None if match["token"] is None else int(match["token"]),
        first=first,
        last=first if match["passage"] and not match["onwards"] else None,
    )


def _action(name: str, argument: str | None) -> Callable[[], None]:
    if name in _PLAIN_ACTIONS and argument is None:
        return _PLAIN_ACTIONS[name]
    if name == "sleep" and argument is not None:
        seconds = float(argument)
        return lambda: time.sleep(seconds)
    if name == "exit" and argument is not None:
        status = int(argument)
        return lambda: os._exit(status)
    raise ValueError(f"{VARIABLE}: {name!r} with argument {argument} is no action")


def _raise() -> None:
    raise RuntimeError("a fail point")


def _run_out_of_memory() -> None:
    raise MemoryError("a fail point")


def _hang() -> NoReturn:
    while True:
        pass


def _hang_with_lock() -> NoReturn:
    wait = ctypes.PyDLL(None).pause  # unlike CDLL, it does not let go of the lock
    while True:
        wait()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _read_nowhere() -> None:
    ctypes.string_at(0)


_PLAIN_ACTIONS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "oom": _run_out_of_memory,
    "hang": _hang,
    "hang_gil": _hang_with_lock,
    "stop": _stop,
    "kill": _kill,
    "segfault": _read_nowhere,
}

_POINTS: Sequence[FailPoint] = ()
ENABLED = False


def read_environment() -> None:
    """Heed what the variable says now: that of a process is set after a fork."""
    global _POINTS, ENABLED
    _POINTS = parse(os.environ.get(VARIABLE, ""))
    ENABLED = bool(_POINTS)


read_environment()


def reach(place: str, requests: Sequence[Request] = ()) -> None:
    """Let happen what is to happen here. Called where `ENABLED` only.

    Args:
        requests: that take part in what is about to be done.
    """
    for point in _POINTS:
        if point.place == place:
            point.pass_by(requests)
