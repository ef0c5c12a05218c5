"""What another core is sent, so that a stream goes on in it."""

from typing import Any, cast

import pytest
from msgspec.structs import replace

from footplate.frontend import RequestMetrics, SamplingParams
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.replay import continuation
from footplate.frontend.stream import RequestStream
from footplate.protocol.bounds import MAX_SEED
from footplate.protocol.messages import AddRequest, Finished, FinishReason, StepOutputs
from footplate.protocol.token_params import LogprobsRequest, TokenParams

ARRIVAL = 10.0
PLAIN = TokenParams(1.0, 1.0, 0, 0.0, 7, 100, 0, ())


def open_stream(
    client: EngineClient, request_id: str = "a", n: int = 1, prior: Any = (), **given: Any
) -> RequestStream:
    """A stream whose request has been sent."""
    params = given.pop("params", PLAIN)
    handle = client.new_handles(n)
    metrics = RequestMetrics(0.0, ARRIVAL)
    own = SamplingParams(n=n)
    stream = RequestStream(request_id, handle, own, params.seed, metrics, lambda stream: None)
    stream.begin(None, [1, 2], None, None, prior)
    client.open(stream)
    message = AddRequest(handle, [1, 2], params, n=n, prior_token_ids=list(prior), **given)
    client.enqueue(stream, message)
    return stream


def receive(client: EngineClient, handle: int, *token_ids: int, position: int = 0) -> None:
    client.handle(StepOutputs(9, [handle], [position], list(token_ids), [len(token_ids)]), 1.0)


def end(client: EngineClient, handle: int) -> None:
    finished = [Finished(handle, FinishReason.LENGTH)]
    client.handle(StepOutputs(9, [], [], [], finished=finished), 1.0)


def go_on(stream: RequestStream, now: float = ARRIVAL) -> AddRequest:
    """The one message that it takes."""
    [message] = requests(stream, now)
    return message


def requests(stream: RequestStream, now: float = ARRIVAL) -> list[AddRequest]:
    messages = continuation(stream, now)
    assert all(isinstance(message, AddRequest) for message in messages)
    return cast(list[AddRequest], messages)


def test_a_request_that_has_not_begun_is_sent_as_it_was() -> None:
    stream = open_stream(EngineClient(), n=3, priority=2, cache_salt="salt", deadline_s=9.0)
    assert stream.sent is not None
    assert go_on(stream) == replace(stream.sent, is_replay=True)


def test_a_request_that_has_begun_goes_on_behind_what_has_come() -> None:
    client = EngineClient()
    stream = open_stream(client, priority=2, cache_salt="salt", deadline_s=9.0)
    assert stream.sent is not None
    receive(client, stream.handle, 5, 6)
    expected = replace(stream.sent, prior_token_ids=[5, 6], is_replay=True)
    assert go_on(stream) == expected
    receive(client, stream.handle, 7, position=2)
    assert go_on(stream).prior_token_ids == [5, 6, 7], "from core to core"


def test_output_that_a_request_came_with_is_sent_again() -> None:
    client = EngineClient()
    stream = open_stream(client, prior=[3, 4])
    assert go_on(stream).prior_token_ids == [3, 4]
    receive(client, stream.handle, 5, position=2)
    assert go_on(stream).prior_token_ids == [3, 4, 5]


def test_what_is_sent_does_not_grow_with_the_stream() -> None:
    client = EngineClient()
    stream = open_stream(client)
    receive(client, stream.handle, 5)
    message = go_on(stream)
    receive(client, stream.handle, 6, position=1)
    assert message.prior_token_ids == [5]


def test_the_clock_goes_on_and_never_back() -> None:
    client = EngineClient()
    stream = open_stream(client, age_s=0.5, deadline_s=9.0)
    assert go_on(stream, ARRIVAL + 3.0).age_s == 3.0
    receive(client, stream.handle, 5)
    message = go_on(stream, ARRIVAL + 4.0)
    assert (message.age_s, message.deadline_s) == (4.0, 9.0)
    assert go_on(stream, ARRIVAL - 1.0).age_s == 0.0


def test_the_first_tokens_deadline_is_over_with_the_first_token() -> None:
    client = EngineClient()
    waits, runs = (open_stream(client, name, ttft_deadline_s=1.0) for name in ("waits", "runs"))
    receive(client, runs.handle, 5)
    assert go_on(waits).ttft_deadline_s == 1.0
    assert go_on(runs).ttft_deadline_s is None


def test_a_request_whose_prompt_is_still_being_encoded_is_not_sent() -> None:
    stream = RequestStream("a", 1, SamplingParams(), 0, RequestMetrics(0.0, 0.0), lambda _: None)
    assert continuation(stream, 1.0) == []


# ---- several completions


def test_siblings_go_on_one_by_one_each_with_its_own_seed() -> None:
    client = EngineClient()
    stream = open_stream(client, n=3)
    receive(client, stream.handle + 1, 5)
    messages = requests(stream)
    assert [m.handle for m in messages] == [1, 2, 3]
    assert [m.n for m in messages] == [1, 1, 1]
    assert [m.params.seed for m in messages] == [7, 8, 9]
    assert [m.prior_token_ids for m in messages] == [[], [5], []]


def test_seeds_of_siblings_go_round_at_the_largest() -> None:
    client = EngineClient()
    stream = open_stream(client, n=2, params=replace(PLAIN, seed=MAX_SEED))
    receive(client, stream.handle, 5)
    assert [m.params.seed for m in requests(stream)] == [MAX_SEED, 0]


def test_siblings_that_have_ended_are_not_sent_again() -> None:
    client = EngineClient()
    stream = open_stream(client, n=3)
    end(client, stream.handle + 1)  # without a token: its deadline, perhaps
    assert [m.handle for m in requests(stream)] == [1, 3]
    assert [m.params.seed for m in requests(stream)] == [7, 9]


# ---- logprobs of the prompt


@pytest.mark.parametrize("begun", [0, 1], ids=["it", "its sibling"])
def test_the_prompt_is_not_scored_again_behind_the_first_token_of_any_sibling(begun: int) -> None:
    client = EngineClient()
    wanted = LogprobsRequest(num_logprobs=2, num_prompt_logprobs=1, prompt_token_ids=(3,))
    stream = open_stream(client, n=2, params=replace(PLAIN, logprobs=wanted))
    assert go_on(stream).params.logprobs == wanted
    receive(client, stream.handle + begun, 5)
    for message in requests(stream):
        assert message.params.logprobs == LogprobsRequest(num_logprobs=2)


@pytest.mark.parametrize("prompt_only", [{"num_prompt_logprobs": 0}, {"prompt_token_ids": (3,)}])
def test_of_logprobs_of_the_prompt_alone_nothing_is_left_to_ask_for(prompt_only: Any) -> None:
    client = EngineClient()
    params = replace(PLAIN, logprobs=LogprobsRequest(**prompt_only))
    stream = open_stream(client, params=params)
    receive(client, stream.handle, 5)
    assert go_on(stream).params.logprobs is None


def test_a_last_token_whose_end_was_lost_is_sent_like_any_other() -> None:
    client = EngineClient()
    stream = open_stream(client, params=replace(PLAIN, max_tokens=2), ttft_deadline_s=1.0)
    receive(client, stream.handle, 5, 6)
    message = go_on(stream)
    assert message.prior_token_ids == [5, 6], "its end is the core's to tell"
    assert message.ttft_deadline_s is None, "its first token was in time"
    end(client, stream.handle)
    assert stream.completions[0].copy_token_ids() == [5, 6] and stream.is_finished


# ---- all streams of a client


def test_every_live_request_is_sent_in_the_order_of_arrival() -> None:
    client = EngineClient()
    a, _, c, d = (open_stream(client, name, n=2) for name in "abcd")
    client.abort(["b"])
    for handle in (a.handle, a.handle + 1):
        end(client, handle)
    receive(client, d.handle, 5)
    assert [m.handle for m in client.replay(ARRIVAL)] == [c.handle, d.handle, d.handle + 1]


def test_a_replayed_request_waits_as_before_and_starts_once() -> None:
    client = EngineClient()
    stream = open_stream(client)
    client.replay(ARRIVAL)
    assert (client.waiting.num_reqs, client.waiting.num_tokens) == (1, 2)
    client.abort([stream.request_id])
    assert (client.waiting.num_reqs, client.waiting.num_tokens) == (0, 0)
    assert client.replay(ARRIVAL) == []
