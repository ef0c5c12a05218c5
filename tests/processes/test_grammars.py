"""Grammars in a core process that has nothing else to do: it sleeps until one is compiled."""

import msgspec

from footplate.protocol.messages import (
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    StepOutputs,
)
from footplate.protocol.token_params import Grammar, TokenParams

from .conftest import StartCore
from .raw_client import RawClient, raw_client

PARAMS = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, ())
HANG = '{"grammars": [{"json_schema": {"type": "integer", "multipleOf": 99999989}}]}'
CHAIN = "start: a0\n" + "".join(f'a{i}: a{i + 1} "b"\n' for i in range(9000)) + 'a9000: "x"'


def add(client: RawClient, handle: int, text: str, language: str = "llguidance") -> None:
    params = msgspec.structs.replace(PARAMS, grammar=Grammar(text, language))
    client.say(AddRequest(handle, [20, 21], params))


def hear_end(client: RawClient) -> Finished:
    while True:
        outputs = client.hear_output()
        assert isinstance(outputs, StepOutputs)
        if outputs.finished:
            return outputs.finished[0]


def test_a_sleeping_core_wakes_when_a_grammar_is_compiled(start_core: StartCore) -> None:
    with raw_client(start_core().address) as client:
        client.join()
        for handle, text in enumerate(["start: /[a-z]*/", "start: /[a-z]*/", CHAIN]):
            add(client, handle, text)
            end = hear_end(client)
            assert end.handle == handle and end.kind is not ErrorKind.GRAMMAR, end


def test_bad_grammars_end_their_requests_and_not_the_core(start_core: StartCore) -> None:
    bad = [
        ("start: nowhere", "llguidance"),
        (HANG, "llguidance"),
        ("", "llguidance"),
        ("{", "llguidance"),
        ("start: a\na: a", "llguidance"),
        ('start: "a"', "esperanto"),
    ]
    with raw_client(start_core().address) as client:
        client.join()
        for handle in range(100):
            add(client, handle, *bad[handle % len(bad)])
            end = hear_end(client)
            assert end.handle == handle
            assert (end.reason, end.kind) == (FinishReason.ERROR, ErrorKind.GRAMMAR)
            assert end.message and "\n" not in end.message
        add(client, 100, "start: /[a-z]*/")
        assert hear_end(client).kind is not ErrorKind.GRAMMAR
        assert client.stats().num_waiting == 0
