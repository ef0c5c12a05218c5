"""Frames that are nearly messages, at whatever reads frames. `scripts/fuzz.py` does the same for
longer."""

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from footplate.backend.engine_core import EngineCore

NUM_FRAMES = 8_000
NUM_SOCKET_FRAMES = 2_500

LoadScript = Callable[[str], ModuleType]


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """What is refused is logged, and here nearly everything is."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["CoreTarget", "ClientTarget"])
async def test_nothing_but_bad_frames_and_refused_messages_comes_of_hostile_frames(
    load_script: LoadScript, name: str, seed: int
) -> None:
    target = make_target(load_script, name, seed)
    for _ in range(NUM_FRAMES):
        target.take_next()
    target.check()
    tally = target.tally
    assert tally.bad + tally.messages == NUM_FRAMES
    assert 0.05 < tally.messages / NUM_FRAMES < 0.5, "too wild, or too mild, to test anything"
    assert (tally.nonsense > 0) == (name == "ClientTarget")


async def test_the_dice_decide_alone_so_that_a_seed_is_a_replay(load_script: LoadScript) -> None:
    frames = [
        [make_target(load_script, "CoreTarget", seed)._mutator.frame() for _ in range(3)]
        for seed in (1, 1, 2)
    ]
    assert frames[0] == frames[1] != frames[2]


def make_target(load_script: LoadScript, name: str, seed: int) -> Any:
    targets = load_script("fuzz_targets")
    return getattr(targets, name)(targets.Random(seed))


async def test_a_target_that_raises_or_keeps_something_is_found(
    load_script: LoadScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target(load_script, "CoreTarget", 0)
    with monkeypatch.context() as patch:
        patch.setattr(EngineCore, "leave", lambda core, client: None)
        with pytest.raises(AssertionError):
            for _ in range(NUM_FRAMES):
                target.take_next()
            target.check()
    monkeypatch.setattr(EngineCore, "handle", lambda core, client, message: [][0])
    with pytest.raises(IndexError):
        for _ in range(NUM_FRAMES):
            target.take_next()


async def test_hostile_clients_are_counted_and_disturb_no_good_one(
    load_script: LoadScript,
) -> None:
    said = await load_script("fuzz_sockets").fuzz_core_socket(NUM_SOCKET_FRAMES, 0)
    assert "all counted" in said


async def test_a_stranger_at_a_clients_socket_disturbs_no_stream(load_script: LoadScript) -> None:
    said = await load_script("fuzz_sockets").fuzz_client_socket(NUM_SOCKET_FRAMES, 0)
    assert "each of them right" in said
