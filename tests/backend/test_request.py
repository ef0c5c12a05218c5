"""The life of a request is a table; these tests read it back, and try what is not in it."""

from itertools import product

import pytest

from footplate.backend.request import TRANSITIONS, Event, Request, State
from footplate.protocol.token_params import TokenParams

LISTED = {
    (State.HELD, Event.RELEASE): State.WAITING,
    (State.HELD, Event.FINISH): State.FINISHED,
    (State.WAITING, Event.ADMIT): State.RUNNING,
    (State.WAITING, Event.FINISH): State.FINISHED,
    (State.WAITING, Event.PARK): State.PARKED,
    (State.RUNNING, Event.PREEMPT): State.PREEMPTED,
    (State.RUNNING, Event.PARK): State.PARKED,
    (State.RUNNING, Event.FINISH): State.FINISHED,
    (State.PREEMPTED, Event.ADMIT): State.RUNNING,
    (State.PREEMPTED, Event.PARK): State.PARKED,
    (State.PREEMPTED, Event.FINISH): State.FINISHED,
    (State.PARKED, Event.RELEASE): State.WAITING,
    (State.PARKED, Event.RESUME): State.PREEMPTED,
    (State.PARKED, Event.FINISH): State.FINISHED,
}


def request(state: State = State.HELD) -> Request:
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 16, 0, ())
    return Request(1, b"client", 7, [3, 4, 5], 3, params, state=state)


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_only_listed_events_move_a_request(state: State, event: Event) -> None:
    moved = request(state)
    if (state, event) in LISTED:
        moved.advance(event)
        assert moved.state is LISTED[state, event]
    else:
        with pytest.raises(AssertionError, match=r"request 1: Event\.\w+ in State\.\w+"):
            moved.advance(event)
        assert moved.state is state


def test_nothing_leaves_the_terminal_state() -> None:
    assert State.FINISHED not in {state for state, _ in TRANSITIONS}


def test_every_state_but_the_first_is_reached_from_another() -> None:
    assert set(TRANSITIONS.values()) | {State.HELD} == set(State)


def test_a_new_request_is_held_and_holds_nothing() -> None:
    new = request()
    assert new.state is State.HELD
    assert (new.block_ids, new.block_hashes, new.num_computed_tokens) == ([], [], 0)
    assert new.finish_reason is None


def test_output_tokens_are_those_behind_the_prompt() -> None:
    running = request(State.RUNNING)
    assert running.num_output_tokens == 0
    running.token_ids += [8, 9]
    assert running.num_output_tokens == 2


def test_a_request_uses_its_clients_share_unless_it_is_said_whose() -> None:
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 16, 0, ())
    assert request().share == b"client"
    assert Request(1, b"client", 7, [3], 1, params, share=b"session").share == b"session"


def test_requests_are_told_apart_by_identity() -> None:
    assert request() != request()
