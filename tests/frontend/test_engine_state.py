"""The life of an engine: listed pairs move, all others are bugs."""

from itertools import product

import pytest

from footplate.frontend.engine_state import TRANSITIONS, EngineEvent, EngineState, advance


@pytest.mark.parametrize(("state", "event"), list(product(EngineState, EngineEvent)))
def test_listed_events_move_and_all_others_are_refused(
    state: EngineState, event: EngineEvent
) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match=state.name):
            advance(state, event)


def test_an_engine_can_be_stopped_in_every_state() -> None:
    assert {advance(state, EngineEvent.STOP) for state in EngineState} == {EngineState.STOPPED}


def test_every_state_can_be_reached_from_a_new_engine() -> None:
    reached = {EngineState.NEW}
    for _ in EngineState:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(EngineState)


def test_only_an_engine_that_is_starting_or_restarting_becomes_ready() -> None:
    before = [state for (state, event) in TRANSITIONS if event is EngineEvent.READY]
    assert before == [EngineState.STARTING, EngineState.RESTARTING]
