"""The life of an engine, as its client sees it."""

from enum import Enum, auto


class EngineState(Enum):
    """Where an engine is in its life."""

    NEW = auto()  # nothing is running yet
    STARTING = auto()  # the core is loading, or being connected to
    SERVING = auto()
    DEAD = auto()  # the core ended without being asked to
    STOPPED = auto()  # shut down by its owner


class EngineEvent(Enum):
    """What moves an engine from state to state."""

    START = auto()
    READY = auto()
    GIVE_UP = auto()  # nothing to attach to: it may be tried again
    DIE = auto()
    STOP = auto()


# What is not in this table is a bug.
TRANSITIONS = {
    (EngineState.NEW, EngineEvent.START): EngineState.STARTING,
    (EngineState.STOPPED, EngineEvent.START): EngineState.STARTING,
    (EngineState.STARTING, EngineEvent.READY): EngineState.SERVING,
    (EngineState.STARTING, EngineEvent.GIVE_UP): EngineState.NEW,
    (EngineState.STARTING, EngineEvent.DIE): EngineState.DEAD,
    (EngineState.SERVING, EngineEvent.DIE): EngineState.DEAD,
    (EngineState.NEW, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.STARTING, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.SERVING, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.DEAD, EngineEvent.STOP): EngineState.STOPPED,
    (EngineState.STOPPED, EngineEvent.STOP): EngineState.STOPPED,
}


def advance(state: EngineState, event: EngineEvent) -> EngineState:
    """The next state. An event the table does not allow is an AssertionError."""
    assert (state, event) in TRANSITIONS, f"engine: {event} in {state}"
    return TRANSITIONS[state, event]
