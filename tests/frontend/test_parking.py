"""A stream that nobody reads has its own request parked, and goes on when it is read."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.frontend import (
    AsyncLLMEngine,
    EngineArgs,
    RequestMetrics,
    RequestOutputKind,
    SamplingParams,
)
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.notices import Notices
from footplate.frontend.stream import RequestStream
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import EngineDrainingError
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Message,
    ParkRequests,
    ResumeRequests,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams

from .conftest import running_core
from .scripted_core import WELCOME, ScriptedCore

CUMULATIVE, DELTA = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA
FINAL_ONLY = RequestOutputKind.FINAL_ONLY
LIMIT = 3


class Streams:
    """Streams of one client, and tokens for them."""

    def __init__(self) -> None:
        self.client = EngineClient()
        self.num_first = 0
        self.positions: Counter[int] = Counter()  # by handle
        self.client.notices.on_first = self._count_first

    def _count_first(self) -> None:
        self.num_first += 1

    def open(
        self, request_id: str = "a", max_unread_tokens: int | None = LIMIT, **params: Any
    ) -> RequestStream:
        given = SamplingParams(**params)
        stream = RequestStream(
            request_id,
            self.client.new_handles(given.n),
            given,
            0,
            RequestMetrics(0.0, 0.0),
            lambda stream: None,
            max_unread_tokens=max_unread_tokens,
            notices=self.client.notices,
        )
        stream.begin(None, [1], None)
        self.client.open(stream)
        return stream

    def push(self, handle: int, count: int = 1) -> None:
        """So many tokens, one by one, as steps bring them."""
        for _ in range(count):
            outputs = StepOutputs(9, [handle], [self.positions[handle]], [5])
            assert not self.client.handle(outputs, 1.0)
            self.positions[handle] += 1

    def told(self) -> list[Message]:
        return list(self.client.notices.take())


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
async def test_a_stream_is_parked_beyond_its_limit_and_resumed_when_it_is_read(
    streams: Streams, kind: RequestOutputKind
) -> None:
    stream = streams.open(output_kind=kind)
    for _ in range(3):
        streams.push(stream.handle, LIMIT)
        assert streams.told() == []
        streams.push(stream.handle)
        assert streams.told() == [ParkRequests([stream.handle])]
        streams.push(stream.handle, 5)  # were under way
        assert streams.told() == [], "it is said once"
        await anext(stream)
        assert streams.told() == [ResumeRequests([stream.handle])]


async def test_who_reads_in_time_is_never_parked(streams: Streams) -> None:
    stream = streams.open()
    for _ in range(100):
        streams.push(stream.handle, LIMIT)
        await anext(stream)
    assert not streams.num_first


async def test_only_the_completion_that_is_unread_is_parked(streams: Streams) -> None:
    stream, other = streams.open(n=2), streams.open("b")
    streams.push(stream.handle + 1, LIMIT + 1)
    streams.push(stream.handle, LIMIT)
    streams.push(other.handle, LIMIT)
    assert streams.told() == [ParkRequests([stream.handle + 1])]


@pytest.mark.parametrize(
    "options", [{"output_kind": FINAL_ONLY}, {"max_unread_tokens": None}], ids=str
)
def test_one_that_wants_only_the_end_or_has_no_limit_is_not_parked(
    streams: Streams, options: dict[str, Any]
) -> None:
    stream = streams.open(**options)
    streams.push(stream.handle, 1000)
    assert not streams.num_first


async def test_a_stream_is_not_parked_before_there_is_something_to_read(streams: Streams) -> None:
    stream = streams.open(stream_interval=10)
    streams.push(stream.handle, 1)
    await anext(stream)
    streams.push(stream.handle, 9)
    assert streams.told() == [], "it would never be read"
    streams.push(stream.handle, 2)
    assert streams.told() == [ParkRequests([stream.handle])]
    await anext(stream)
    assert streams.told() == [ResumeRequests([stream.handle])]


async def test_tokens_that_it_came_with_are_read(streams: Streams) -> None:
    stream = streams.open("other")
    stream.completions[0].resume([1, 2, 3, 4, 5])
    streams.positions[stream.handle] = 5
    streams.push(stream.handle, LIMIT)
    assert streams.told() == []
    streams.push(stream.handle)
    assert streams.told() == [ParkRequests([stream.handle])]


async def test_what_has_ended_is_read_and_nobody_is_told(streams: Streams) -> None:
    ended, failed = streams.open("a"), streams.open("b")
    for stream in (ended, failed):
        streams.push(stream.handle, LIMIT + 1)
    assert streams.told() == [ParkRequests([ended.handle, failed.handle])]
    ends = [Finished(ended.handle, FinishReason.DEADLINE)]
    ends.append(Finished(failed.handle, FinishReason.ERROR, "no"))
    streams.client.handle(StepOutputs(9, [], [], [], finished=ends), 2.0)
    for stream in (ended, failed):
        assert len((await anext(stream)).outputs[0].token_ids) == LIMIT + 1
    assert streams.told() == []


async def test_what_is_read_before_it_was_told_is_not_told(streams: Streams) -> None:
    stream = streams.open()
    streams.push(stream.handle, LIMIT + 1)
    await anext(stream)
    assert streams.told() == []
    streams.push(stream.handle, LIMIT + 1)
    streams.told()
    await anext(stream)
    streams.push(stream.handle, LIMIT + 1)
    assert streams.told() == [], "parked, resumed and parked: it is as it was"


async def test_what_nobody_reads_is_parked_in_another_core_as_well(streams: Streams) -> None:
    parked, read, ended = (streams.open(name) for name in ("parked", "read", "ended"))
    for stream in (parked, read, ended):
        params = TokenParams(0.0, 1.0, 0, 0.0, 0, 99, 0, ())
        streams.client.enqueue(stream, AddRequest(stream.handle, [1], params))
        streams.push(stream.handle, LIMIT + 1)
    streams.told()
    await anext(read)
    assert streams.client.abort(["ended"])
    streams.client.notices.abort([ended.handle])
    replayed = streams.client.replay(5.0)
    assert [message.handle for message in replayed] == [parked.handle, read.handle]
    assert streams.told() == [ParkRequests([parked.handle])], "nothing of what was before"
    await anext(parked)
    assert streams.told() == [ResumeRequests([parked.handle])]


def test_an_engine_that_takes_nothing_new_is_an_error_of_its_own(streams: Streams) -> None:
    stream = streams.open()
    end = Finished(stream.handle, FinishReason.ERROR, "about to end", ErrorKind.DRAINING)
    streams.client.handle(StepOutputs(9, [], [], [], finished=[end]), 2.0)
    with pytest.raises(EngineDrainingError, match="about to end"):
        raise stream._error or AssertionError


# ---- notices


def test_notices_are_gathered_and_taken_once() -> None:
    notices, firsts = Notices(), [0]

    def on_first() -> None:
        firsts[0] += 1

    notices.on_first = on_first
    assert not notices and notices.take() == []
    notices.abort([])
    assert firsts == [0]
    for handle in range(10_000):
        notices.abort([handle])
    notices.park(10_001)
    notices.resume(10_002)
    notices.end(10_003)
    assert firsts == [1] and notices
    assert notices.take() == [
        AbortRequests(list(range(10_000))),
        AbortRequests([10_003], have_ended=True),
        ParkRequests([10_001]),
        ResumeRequests([10_002]),
    ]
    assert not notices and notices.take() == []
    notices.park(1)
    assert firsts == [2]
    notices.take()
    notices.end(1)
    assert firsts == [3] and notices


# ---- on the wire


async def test_a_core_is_told_of_readers_that_sleep_and_wake(tmp_path: Path) -> None:
    welcome = msgspec.structs.replace(WELCOME, requests=RequestConfig(max_unread_tokens=LIMIT))
    params = SamplingParams(max_tokens=50, detokenize=False)
    with ScriptedCore.at(f"ipc://{tmp_path}/engine.sock") as core:
        engine = AsyncLLMEngine.connect(core.address)
        starting = asyncio.create_task(engine.start())
        await core.accept(welcome)
        await starting
        sleeping = await engine.add_request("sleeping", [1], params)
        awake = await engine.add_request("awake", [1], params)
        for _ in range(2):
            await core.hear_request()
        for position in range(LIMIT + 1):
            await core.push(
                StepOutputs(WELCOME.epoch, [sleeping.handle, awake.handle], [position] * 2, [7, 8])
            )
            await anext(awake)
        assert await core.hear() == ParkRequests([sleeping.handle])
        output = await anext(sleeping)
        assert output.outputs[0].token_ids == [7] * (LIMIT + 1)
        assert await core.hear() == ResumeRequests([sleeping.handle])
        engine.shutdown()


async def test_streams_that_are_left_at_once_are_one_message_before_what_comes_next(
    tmp_path: Path,
) -> None:
    with ScriptedCore.at(f"ipc://{tmp_path}/engine.sock") as core:
        engine = AsyncLLMEngine.connect(core.address)
        starting = asyncio.create_task(engine.start())
        await core.accept()
        await starting

        async def read() -> None:
            async for _ in engine.generate([1], SamplingParams(max_tokens=50, detokenize=False)):
                pass

        tasks = [asyncio.create_task(read()) for _ in range(100)]
        handles = [(await core.hear_request()).handle for _ in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        asking = asyncio.create_task(engine.get_stats())
        aborted = await core.hear()
        assert isinstance(aborted, AbortRequests)
        assert sorted(aborted.handles) == handles
        assert await core.hear() == GetStats(1)
        engine.shutdown()
        await asyncio.gather(asking, return_exceptions=True)


# ---- through a core


@pytest.fixture(scope="module")
def parking_address() -> Iterator[str]:
    with running_core(
        EngineArgs(model="fake", max_model_len=100_000, max_unread_tokens=50)
    ) as address:
        yield address


async def test_a_reader_that_sleeps_costs_nobody_a_token_and_no_memory(
    parking_address: str,
) -> None:
    params = SamplingParams(max_tokens=2000, detokenize=False, output_kind=DELTA, seed=1)

    async def tokens_of(stream: Any) -> list[int]:
        return [token_id async for out in stream for token_id in out.outputs[0].token_ids]

    async with AsyncLLMEngine.connect(parking_address) as engine:
        expected = await tokens_of(await engine.add_request(None, [3], params))
        sleeping = await engine.add_request(None, [3], params)
        others = [await engine.add_request(None, [3], params) for _ in range(31)]
        # However fast the core is, these come to their ends.
        for tokens in await asyncio.gather(*map(tokens_of, others)):
            assert tokens == expected
        stats = await engine.get_stats()
        assert (stats.num_running, stats.num_parked) == (0, 1)
        assert stats.num_free_blocks == (await engine.get_scheduler_config()).num_kv_blocks
        num_unread = sleeping.completions[0].num_tokens
        assert 50 < num_unread < 1500, "what was under way, and no more"
        assert await tokens_of(sleeping) == expected
