"""The life of an engine, as its client sees it."""

from enum import Enum, auto


class EngineState(Enum):
    """Where an engine is in its life."""

    NEW = auto()  # nothing is running yet
    STARTING = auto()  # the core is loading, or being connected to
    SERVING = auto()
    RESTARTING = auto()  # the core is gone, another is on its way; requests wait for it
    DEAD = auto()  # the core ended without being asked to, and no other has come
    STOPPED = auto()  # shut down by its owner


class EngineEvent(Enum):
    """What moves an engine from state to state."""

    START = auto()
    READY = auto()
    GIVE_UP = auto()  # nothing to attach to: it may be tried again
    LOSE = auto()  # the core is gone, and is to be replaced
    DIE = auto()
    STOP = auto()


# What is not in this table is a bug.
TRANSITIONS = {
    (EngineState.NEW, EngineEvent.START): EngineState.STARTING,
    (EngineState.STOPPED, EngineEvent.START): EngineState.STARTING,
    (EngineState.STARTING, EngineEvent.READY): EngineState.SERVING,
    (EngineState.STARTING, EngineEvent.GIVE_UP): EngineState.NEW,
    (EngineState.STARTING, EngineEvent.DIE): EngineState.DEAD,
    (EngineState.SERVING, EngineEvent.LOSE): EngineState.RESTARTING,
    (EngineState.SERVING, EngineEvent.DIE): EngineState.DEAD,
    (EngineState.RESTARTING, EngineEvent.READY): EngineState.SERVING,
    (EngineState.RESTARTING, EngineEvent.DIE): EngineState.DEAD,
    (EngineState.NEW, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.STARTING, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.SERVING, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.RESTARTING, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.DEAD, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.STOPPED, EngineEvent.STOP): EngineState.STOPPED,
}


def advance(state: EngineState, event: EngineEvent) -> EngineState:
    """The next state. An event the table does not allow is an AssertionError."""
    assert (state, event) in TRANSITIONS, f"engine: {event} in {state}"
    return TRANSITIONS[state, event]
