"""What clients are told of the core's state, by who and where they are."""

from pathlib import Path

import msgspec
import pytest

from footplate.backend.inbox import as_told_to
from footplate.backend.roles import Peer
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    Limits,
    ModelFacts,
    Progress,
    Refused,
    Welcome,
)

FACTS = ModelFacts("/models/qwen3", "/models/qwen3", "Qwen3", 9, 9, (1,), "float32", "cpu", "x")
WELCOME = Welcome(1, PROTOCOL_VERSION, FACTS, Limits(1, 1, "fcfs", 1, 1, True), 4711, {})
OUTSIDER = Peer(key="a" * 40, role="generate", host="127.0.0.1", is_insider=False)


def test_the_cores_own_user_is_told_all() -> None:
    for state in (WELCOME, Progress("loading", 0.5), Refused("start", "/x does not exist")):
        assert as_told_to(Peer(), state) == state


def test_a_client_on_this_machine_is_told_its_role_and_where_the_tokenizer_is() -> None:
    told = as_told_to(OUTSIDER, WELCOME)
    assert told == msgspec.structs.replace(WELCOME, role="generate")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/models/qwen3", "qwen3"),
        ("models/qwen3", "qwen3"),
        ("/models/qwen3/", "qwen3"),
        ("demo", "demo"),
    ],
)
def test_a_client_elsewhere_is_told_no_path(given: str, told: str) -> None:
    far = Peer(key="a" * 40, role="admin", host="10.0.0.7", is_insider=False)
    facts = msgspec.structs.replace(FACTS, model=given, tokenizer=given)
    welcome = as_told_to(far, msgspec.structs.replace(WELCOME, model=facts))
    assert isinstance(welcome, Welcome)
    assert (welcome.model.model, welcome.model.tokenizer) == (told, told)
    assert welcome.process_id == 0 and welcome.role == "admin"
    assert welcome.limits == WELCOME.limits


def test_why_a_start_failed_is_told_without_places() -> None:
    refused = Refused("start", "ValueError: /models/qwen3/config.json is no JSON")
    assert as_told_to(OUTSIDER, refused) == Refused("start", "ValueError: <path> is no JSON")
    assert Path("/models/qwen3").name not in str(as_told_to(OUTSIDER, refused))
