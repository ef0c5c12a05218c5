"""From step outputs to streams, in plain calls."""

from typing import Any

import msgspec
import pytest

from footplate.frontend import RequestMetrics, SamplingParams
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.output_text import OutputText
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings
from footplate.protocol.errors import (
    DuplicateRequestError,
    EngineDeadError,
    QueueOverflowError,
    RequestFailedError,
)
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    LogprobRows,
    Started,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams


class Letters:
    """A detokenizer to which a token id is a letter: 0 is a."""

    def feed(self, token_ids: Any) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)

    def finish(self) -> str:
        return ""


def open_stream(
    client: EngineClient, request_id: str, stop: tuple[str, ...] = (), **params: Any
) -> RequestStream:
    given = SamplingParams(stop=stop, **params)
    stream = RequestStream(
        request_id,
        client.new_handles(given.n),
        given,
        0,
        RequestMetrics(0.0, 0.0),
        lambda stream: None,
    )
    stream.begin(None, [1], lambda: OutputText(Letters(), StopStrings(stop) if stop else None))
    client.open(stream)
    return stream


def outputs(*runs: tuple[int, int, list[int]], **tables: Any) -> StepOutputs:
    """Runs of (handle, position, token ids), as the core would put them into columns."""
    handles = [handle for handle, _, _ in runs]
    positions = [position for _, position, _ in runs]
    token_ids = [token_id for _, _, ids in runs for token_id in ids]
    counts = [len(ids) for _, _, ids in runs]
    if all(count == 1 for count in counts):
        counts = []
    return StepOutputs(9, handles, positions, token_ids, counts, **tables)


async def tokens_of(stream: RequestStream) -> list[int]:
    """All that a stream which has ended well holds."""
    return [output async for output in stream][-1].outputs[0].token_ids


async def test_every_stream_gets_its_own_tokens() -> None:
    client = EngineClient()
    a, b = open_stream(client, "a"), open_stream(client, "b")
    assert client.handle(outputs((b.handle, 0, [5]), (a.handle, 0, [6])), 1.0) == []
    assert client.handle(outputs((a.handle, 1, [7, 8]), (b.handle, 1, [9])), 2.0) == []
    finished = [Finished(a.handle, FinishReason.LENGTH), Finished(b.handle, FinishReason.STOP)]
    assert client.handle(outputs(finished=finished), 3.0) == []
    assert (await tokens_of(a), await tokens_of(b)) == ([6, 7, 8], [5, 9])
    assert (a.metrics.first_token, a.metrics.last_token) == (1.0, 2.0)


async def test_the_report_on_a_start_reaches_its_stream() -> None:
    client = EngineClient()
    a, b = open_stream(client, "a"), open_stream(client, "b")
    started = [Started(b.handle, 32, 0.5, 0.25), Started(99, 1, 1.0, 1.0)]
    client.handle(outputs(started=started), 1.0)
    assert (a.num_cached_tokens, b.num_cached_tokens) == (None, 32)


async def test_an_ended_request_leaves_its_id_free_and_its_handle_used() -> None:
    client = EngineClient()
    first = open_stream(client, "a")
    client.handle(outputs(finished=[Finished(first.handle, FinishReason.LENGTH)]), 1.0)
    assert client.num_live == 0
    second = open_stream(client, "a")
    assert second.handle != first.handle
    assert client.num_live == 1


async def test_a_live_id_is_refused() -> None:
    client = EngineClient()
    open_stream(client, "a")
    with pytest.raises(DuplicateRequestError, match="'a'"):
        client.require_unused("a")
    with pytest.raises(DuplicateRequestError, match="'a'"):
        open_stream(client, "a")
    client.require_unused("b")
    assert client.num_live == 1


# ---- positions


@pytest.mark.parametrize("repeat", [[5], [5, 6]], ids=["single", "run"])
async def test_tokens_that_came_before_are_dropped(repeat: list[int]) -> None:
    client = EngineClient()
    stream = open_stream(client, "a")
    client.handle(outputs((stream.handle, 0, [5, 6])), 1.0)
    assert client.handle(outputs((stream.handle, 0, repeat)), 1.0) == []
    assert client.handle(outputs((stream.handle, 1, [6])), 1.0) == []
    client.handle(outputs((stream.handle, 2, [7])), 1.0)
    client.handle(outputs(finished=[Finished(stream.handle, FinishReason.LENGTH)]), 1.0)
    assert await tokens_of(stream) == [5, 6, 7]


async def test_of_a_run_that_overlaps_only_the_new_end_is_taken() -> None:
    client = EngineClient()
    stream = open_stream(client, "a")
    client.handle(outputs((stream.handle, 0, [5, 6])), 1.0)
    client.handle(outputs((stream.handle, 1, [6, 7, 8])), 1.0)
    client.handle(outputs(finished=[Finished(stream.handle, FinishReason.LENGTH)]), 1.0)
    assert await tokens_of(stream) == [5, 6, 7, 8]


@pytest.mark.parametrize("late", [[7], [7, 8]], ids=["single", "run"])
async def test_a_gap_ends_the_stream_it_is_in_and_no_other(late: list[int]) -> None:
    client = EngineClient()
    holed, whole = open_stream(client, "holed"), open_stream(client, "whole")
    client.handle(outputs((holed.handle, 0, [5]), (whole.handle, 0, [5])), 1.0)
    over = client.handle(outputs((holed.handle, 2, late), (whole.handle, 1, [6])), 1.0)
    assert over == [holed.handle], "the core need not go on with it"
    assert client.num_live == 1
    assert (await anext(holed)).outputs[0].token_ids == [5]
    with pytest.raises(RequestFailedError, match="'holed': token 1 is missing, 2 came"):
        await anext(holed)
    assert (await anext(whole)).outputs[0].token_ids == [5, 6]


async def test_outputs_for_unknown_streams_are_ignored() -> None:
    client = EngineClient()
    stream = open_stream(client, "a")
    gone = stream.handle + 1
    for message in (
        outputs((gone, 0, [5])),
        outputs((gone, 3, [5, 6]), (stream.handle, 0, [7, 8])),
        outputs(finished=[Finished(gone, FinishReason.ERROR, "why")]),
    ):
        assert client.handle(message, 1.0) == []
    assert (await anext(stream)).outputs[0].token_ids == [7, 8]


async def test_a_stream_whose_text_cannot_be_made_ends_alone() -> None:
    client = EngineClient()
    broken, whole = (open_stream(client, name, stop=("stop",)) for name in ("broken", "whole"))
    for no_letter in (outputs((broken.handle, 0, [2**31]), (whole.handle, 0, [1])),):
        assert client.handle(no_letter, 1.0) == [broken.handle]
    client.handle(outputs((whole.handle, 1, [2, 3])), 1.0)
    client.handle(outputs(finished=[Finished(whole.handle, FinishReason.LENGTH)]), 1.0)
    assert await tokens_of(whole) == [1, 2, 3]
    with pytest.raises(RequestFailedError, match="'broken'"):
        async for _ in broken:
            pass


@pytest.mark.parametrize(
    "nonsense", [StepOutputs(9, [1, 2], [0], [5, 6]), StepOutputs(9, [1], [0, 0], [5], [1])]
)
def test_columns_that_do_not_fit_together_are_an_error(nonsense: StepOutputs) -> None:
    with pytest.raises(ValueError, match="argument"):
        EngineClient().handle(nonsense, 1.0)


# ---- ends that begin here


async def test_a_stop_string_ends_a_stream_and_the_core_is_to_be_told() -> None:
    client = EngineClient()
    a, b, c = (open_stream(client, name, stop=("bc",)) for name in "abc")
    assert client.handle(outputs((a.handle, 0, [1]), (b.handle, 0, [1, 2, 3])), 1.0) == [b.handle]
    assert client.handle(outputs((a.handle, 1, [2]), (c.handle, 0, [2])), 1.0) == [a.handle]
    assert client.num_live == 1
    # What the core sent before it was told.
    late = outputs((a.handle, 2, [3]), finished=[Finished(a.handle, FinishReason.ABORT)])
    assert client.handle(late, 1.0) == []
    assert await tokens_of(a) == [1, 2]


def send(client: EngineClient, stream: RequestStream, request_id: str | None = None) -> None:
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 99, 0, ())
    n = len(stream.completions)
    client.enqueue(stream, AddRequest(stream.handle, [1], params, n=n, request_id=request_id))


async def test_of_a_request_with_an_id_the_core_is_told_that_a_stop_string_has_ended_it() -> None:
    client = EngineClient()
    stopped, aborted = (open_stream(client, name, stop=("bc",)) for name in ("stopped", "aborted"))
    for stream in (stopped, aborted):
        send(client, stream, stream.request_id)
    told = outputs((stopped.handle, 0, [1, 2, 3]), (aborted.handle, 0, [1, 1, 1]))
    assert client.handle(told, 1.0) == []
    assert client.notices.take() == [AbortRequests([stopped.handle], have_ended=True)]
    assert await tokens_of(stopped) == [1, 2]
    # Its user's own abort, and output that is of no use, leave nothing to be kept.
    assert client.abort(["stopped", "aborted"]) == AbortRequests([aborted.handle])
    holed = open_stream(client, "holed")
    send(client, holed, "holed")
    assert client.handle(outputs((holed.handle, 2, [5])), 1.0) == [holed.handle]
    assert not client.notices


async def test_of_several_completions_each_is_stopped_by_itself_and_has_no_id() -> None:
    client = EngineClient()
    stream = open_stream(client, "a", stop=("bc",), n=3)
    send(client, stream)
    assert client.handle(outputs((2, 0, [1, 2]), (1, 0, [1])), 1.0) == [2]
    assert client.handle(outputs((3, 0, [1, 2]), (1, 1, [2])), 1.0) == [3, 1]
    assert not client.notices and client.num_live == 0


async def test_aborting_ends_streams_at_once_and_names_their_handles() -> None:
    client = EngineClient()
    a, b, c = (open_stream(client, name) for name in "abc")
    client.handle(outputs((a.handle, 0, [5])), 1.0)
    assert client.abort(["c", "unknown", "a", "a"]) == AbortRequests([c.handle, a.handle])
    assert await tokens_of(a) == [5]
    assert (await anext(c)).outputs[0].finish_reason == "abort"
    assert client.num_live == 1
    client.require_unused("a")
    assert not b.is_finished


async def test_aborting_nothing_says_nothing() -> None:
    client = EngineClient()
    stream = open_stream(client, "a")
    client.handle(outputs(finished=[Finished(stream.handle, FinishReason.LENGTH)]), 1.0)
    assert client.abort([]) is None
    assert client.abort(["a", "unknown"]) is None


async def test_a_failure_reaches_every_live_stream() -> None:
    client = EngineClient()
    done, a, b = (open_stream(client, name) for name in ("done", "a", "b"))
    client.handle(outputs((a.handle, 0, [5])), 1.0)
    client.handle(outputs(finished=[Finished(done.handle, FinishReason.LENGTH)]), 1.0)
    client.fail_all(EngineDeadError("killed"))
    assert client.num_live == 0
    assert (await anext(a)).outputs[0].token_ids == [5]
    for stream in (a, b):
        with pytest.raises(EngineDeadError, match="killed"):
            await anext(stream)
    assert (await anext(done)).finished


# ---- several completions of one request


async def test_handles_of_one_request_are_consecutive_and_end_one_by_one() -> None:
    client = EngineClient()
    a, b = open_stream(client, "a", n=2), open_stream(client, "b")
    assert [c.handle for c in a.completions] == [1, 2] and b.handle == 3
    client.handle(outputs((2, 0, [5]), (1, 0, [6])), 1.0)
    client.handle(outputs(finished=[Finished(2, FinishReason.STOP)]), 1.0)
    assert client.num_live == 2
    client.handle(outputs((1, 1, [7]), finished=[Finished(1, FinishReason.LENGTH)]), 1.0)
    assert client.num_live == 1
    last = [output async for output in a][-1]
    assert [c.token_ids for c in last.outputs] == [[6, 7], [5]] and last.finished


async def test_aborting_names_the_handles_that_are_still_live() -> None:
    client = EngineClient()
    open_stream(client, "a", n=3)
    client.handle(outputs((2, 0, [5]), finished=[Finished(2, FinishReason.STOP)]), 1.0)
    assert client.abort(["a"]) == AbortRequests([1, 3])
    assert client.num_live == 0


async def test_a_completion_that_fails_takes_its_siblings_along_and_nobody_else() -> None:
    client = EngineClient()
    a, b = open_stream(client, "a", n=3), open_stream(client, "b")
    failed = Finished(2, FinishReason.ERROR, "NaN logits", ErrorKind.LOGITS)
    assert client.handle(outputs((1, 0, [5]), finished=[failed]), 1.0) == [1, 3]
    output = await anext(a)
    assert [c.finish_reason for c in output.outputs] == ["abort", "error", "abort"]
    with pytest.raises(RequestFailedError, match="'a': NaN logits"):
        await anext(a)
    assert client.num_live == 1 and not b.is_finished


async def test_a_gap_in_one_completion_ends_the_request() -> None:
    client = EngineClient()
    a = open_stream(client, "a", n=2)
    assert client.handle(outputs((2, 1, [5])), 1.0) == [1, 2]
    with pytest.raises(RequestFailedError, match="token 0 is missing"):
        await anext(a)


async def test_missing_logprobs_end_the_request() -> None:
    client = EngineClient()
    a = open_stream(client, "a", logprobs=0)
    row = LogprobRows(1, 0, [1], bytes(4), bytes(4))
    client.handle(outputs((1, 0, [5]), logprobs=[row]), 1.0)
    late = msgspec.structs.replace(row, position=2)
    assert client.handle(outputs((1, 1, [5]), logprobs=[late]), 1.0) == [1]
    assert (await anext(a)).outputs[0].token_ids == [5]
    with pytest.raises(RequestFailedError, match="token 1 is missing, 2 came"):
        await anext(a)


async def test_tokens_without_their_logprobs_end_the_request_and_no_other() -> None:
    client = EngineClient()
    a, b = open_stream(client, "a", logprobs=0), open_stream(client, "b", logprobs=0)
    rows = [LogprobRows(handle, 0, [1], bytes(4), bytes(4)) for handle in (1, 2)]
    client.handle(outputs((1, 0, [5]), (2, 0, [5]), logprobs=rows), 1.0)
    row = msgspec.structs.replace(rows[1], position=1)
    assert client.handle(outputs((1, 1, [6]), (2, 1, [6]), logprobs=[row]), 1.0) == [1]
    assert (await anext(a)).outputs[0].token_ids == [5]
    with pytest.raises(RequestFailedError, match="token 1 came without its logprobs"):
        await anext(a)
    assert (await anext(b)).outputs[0].token_ids == [5, 6]


async def test_logprobs_that_begin_behind_the_next_token_end_the_request() -> None:
    client = EngineClient()
    a = open_stream(client, "a", logprobs=0)
    row = LogprobRows(1, 5, [1], bytes(4), bytes(4))
    assert client.handle(outputs((1, 0, [5]), logprobs=[row]), 1.0) == [1]
    with pytest.raises(RequestFailedError, match="token 0 is missing, 5 came"):
        await anext(a)


@pytest.mark.parametrize(
    "ranks, ids, logprobs",
    [
        ([1, 1], bytes(8), bytes(4)),
        ([1, 1], bytes(4), bytes(4)),
        ([1], b"", b""),
        ([], bytes(4), bytes(4)),
        ([], b"", b""),
    ],
)
async def test_rows_that_are_no_rows_are_an_error(
    ranks: list[int], ids: bytes, logprobs: bytes
) -> None:
    client = EngineClient()
    open_stream(client, "a", logprobs=0)
    with pytest.raises(ValueError, match="whole rows"):
        client.handle(outputs(logprobs=[LogprobRows(1, 0, ranks, ids, logprobs)]), 1.0)


# ---- who waits


def request_of(stream: RequestStream) -> AddRequest:
    params = TokenParams(0.0, 1.0, 0, 0.0, stream.seed, 100, 0, ())
    return AddRequest(stream.handle, stream.prompt_token_ids, params, n=stream.params.n)


def enqueue(client: EngineClient, request_id: str, **params: Any) -> RequestStream:
    stream = open_stream(client, request_id, **params)
    client.enqueue(stream, request_of(stream))
    return stream


def waiting(client: EngineClient) -> tuple[int, int]:
    return client.waiting.num_reqs, client.waiting.num_tokens


async def test_a_request_waits_until_it_starts_and_its_prompt_is_counted_once() -> None:
    client = EngineClient()
    enqueue(client, "a", n=3)
    assert waiting(client) == (3, 1)
    started = Started(2, 0, 0.0, 0.0)
    client.handle(outputs((2, 0, [5]), started=[started]), 1.0)
    assert waiting(client) == (2, 0)
    client.handle(outputs(started=[started]), 1.0)
    assert waiting(client) == (2, 0), "it has started already"


@pytest.mark.parametrize("end", ["finish", "abort", "fail", "error"])
async def test_whoever_ends_waits_no_longer(end: str) -> None:
    client = EngineClient()
    enqueue(client, "a", n=2)
    match end:
        case "finish":
            ends = [Finished(handle, FinishReason.DEADLINE) for handle in (1, 2)]
            client.handle(outputs(finished=ends), 1.0)
        case "error":
            client.handle(outputs(finished=[Finished(1, FinishReason.ERROR, "why")]), 1.0)
        case "abort":
            client.abort(["a"])
        case "fail":
            client.fail_all(EngineDeadError("killed"))
    assert waiting(client) == (0, 0)


async def test_a_core_that_is_full_says_so_with_a_time_to_come_back() -> None:
    client = EngineClient()
    stream = enqueue(client, "a")
    full = Finished(1, FinishReason.ERROR, "9 requests wait", ErrorKind.OVERFLOW)
    client.handle(outputs(finished=[full]), 1.0)
    assert (await anext(stream)).finished
    with pytest.raises(QueueOverflowError, match="9 requests wait") as caught:
        await anext(stream)
    assert caught.value.retry_after_s > 0
