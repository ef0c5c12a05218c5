"""What an engine says of itself: its health, and what became of a core that was replaced."""

import msgspec


class Health(msgspec.Struct, frozen=True):
    """How an engine is.

    Attributes:
        state: "new", "starting", "serving", "draining", "restarting", "dead" or "stopped".
        is_alive: the core's process answers. False while it is being replaced.
        is_ready: it takes requests and gets on with them.
        last_step_age_s: how long the core has been in its current step, as far as is known, in
            seconds; 0 when it is idle.
    """

    state: str
    is_alive: bool
    is_ready: bool
    last_step_age_s: float


class Restart(msgspec.Struct, frozen=True):
    """A core has been replaced; every stream goes on where it was.

    Attributes:
        cause: why the one before ended.
        num_restarts: of this engine so far, with this one.
        num_replayed: requests that the new core was given.
        seconds: from the end of one to the other's being ready.
    """

    cause: str
    num_restarts: int
    num_replayed: int
    seconds: float
