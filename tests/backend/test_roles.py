"""Who may ask for what: all messages that there are."""

from typing import get_args

import pytest

from footplate.backend.roles import FOR_EVERYBODY, Peer, words_for_refusal
from footplate.protocol.messages import ClientMessage, Drain, GetStats, ResetPrefixCache

CALLS = {ResetPrefixCache: ResetPrefixCache(1), Drain: Drain(1)}


def test_every_message_is_for_everybody_or_has_been_thought_of() -> None:
    for_admins = set(get_args(ClientMessage)) - FOR_EVERYBODY
    assert for_admins == set(CALLS), "say in roles.py who may send the new message"
    assert set(get_args(ClientMessage)) >= FOR_EVERYBODY


@pytest.mark.parametrize("call", CALLS.values())
def test_what_concerns_the_others_is_for_admins(call: ResetPrefixCache | Drain) -> None:
    assert Peer(role="admin").may_send(call)
    writer = Peer(role="generate")
    assert not writer.may_send(call)
    assert "needs the role admin" in words_for_refusal(writer, call)
    assert writer.may_send(GetStats(1))


def test_a_peer_without_a_key_is_the_cores_own_user() -> None:
    assert Peer().role == "admin"
    assert Peer().is_insider
