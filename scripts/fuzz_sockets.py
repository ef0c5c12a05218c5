"""Hostile frames through real sockets: at a core with a good client beside, and at a client."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil
import zmq

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestOutput, SamplingParams
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.codec import (
    BadFrameError,
    Encoder,
    client_message_decoder,
    core_message_decoder,
)
from footplate.protocol.links import make_private_dir, new_client_id, output_endpoint
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    ControlReply,
    Drain,
    GetStats,
    Goodbye,
    Hello,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams
from hostile_frames import FROM_CLIENT, FROM_CORE, FrameMutator

ARGS = EngineArgs(model="fake", max_model_len=4096, log_level="ERROR")
NUM_GOOD_STREAMS = 8
FRAMES_PER_LIFE = 500  # of a hostile client; then it comes as somebody else
SETTLE_S = 60.0
LAST_CALL = 2**40  # a number that no other call has
TURN_FRAMES = 50  # then the event loop has a turn
GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 1, 0, ())


def fake_tokens(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What the fake model must answer, greedily."""
    token_ids, digest = [], digest_prefix(prompt)
    for position in range(count):
        token_ids.append(next_token(digest, position, GREEDY, vocab_size, first_id=16))
        digest = digest_prefix(token_ids[-1:], digest)
    return token_ids


@dataclass
class GoodClient:
    """Owns streams that run one after the other, and checks each of their tokens."""

    engine: AsyncLLMEngine
    num_streams: int = 0
    num_tokens: int = 0
    worst_gap_s: float = 0.0
    is_over: bool = False
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    def begin(self) -> None:
        """Start the streams."""
        self.tasks = [asyncio.create_task(self._stream(n)) for n in range(NUM_GOOD_STREAMS)]

    async def end(self) -> None:
        """Let each have come to its end once. Raises what was wrong with any of them."""
        self.is_over = True
        await asyncio.gather(*self.tasks)

    async def _stream(self, number: int) -> None:
        vocab_size = (await self.engine.get_model_config()).vocab_size
        dice = Random(number)
        has_streamed = False
        while not (self.is_over and has_streamed):
            has_streamed = True
            prompt = [dice.randrange(16, vocab_size) for _ in range(dice.randrange(1, 60))]
            count = dice.randrange(1, 300)
            params = SamplingParams(temperature=0, max_tokens=count, detokenize=False)
            since = time.monotonic()
            last: RequestOutput | None = None
            async for last in self.engine.generate(prompt, params):  # noqa: B007
                now = time.monotonic()
                self.worst_gap_s = max(self.worst_gap_s, now - since)
                since = now
            assert last is not None
            assert last.outputs[0].token_ids == fake_tokens(prompt, count, vocab_size)
            self.num_streams += 1
            self.num_tokens += count

    def __str__(self) -> str:
        return (
            f"the good client: {self.num_streams} streams, {self.num_tokens} tokens, each of them "
            f"right, at most {self.worst_gap_s:.3f} s between two outputs"
        )


@asynccontextmanager
async def live_core() -> AsyncIterator[tuple[str, CoreProcess, AsyncLLMEngine]]:
    """A core, and a client that has attached to it. Fails if the core ends before its time."""
    folder = make_private_dir()
    address = f"ipc://{folder}/engine.sock"
    ends: list[Exception] = []
    process = CoreProcess(ARGS.core_config(address, str(folder)), ends.append)
    try:
        async with AsyncLLMEngine.connect(address, tokenizer=str(DEMO_MODEL)) as engine:
            yield address, process, engine
            stats = await engine.get_stats()
            limits = await engine.get_scheduler_config()
            assert (stats.num_running, stats.num_waiting) == (0, 0), stats
            assert stats.num_free_blocks == limits.num_kv_blocks, stats
        assert not ends, ends
    finally:
        process.stop()


class HostileClient:
    """Owns a DEALER that has said Hello, or never does, and the PULL that it named."""

    def __init__(self, address: str, *, joins: bool) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._encode = Encoder().encode
        self._joins = joins
        client_id = new_client_id()
        endpoint = output_endpoint(address, client_id)
        self._pull = self._context.socket(zmq.PULL)
        self._pull.bind(endpoint)
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.set(zmq.ROUTING_ID, client_id)
        self._dealer.connect(address)
        if joins:
            self._dealer.send(self._encode(Hello(PROTOCOL_VERSION, endpoint)))

    async def send(self, frame: bytes) -> None:
        """Send one frame, whatever the core says meanwhile."""
        while True:
            try:
                self._dealer.send(frame, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(0.001)

    def read(self) -> list[bytes]:
        """What has come by the PULL; what has come by the other is thrown away."""
        frames: tuple[list[bytes], list[bytes]] = ([], [])
        for reader, received in zip((self._dealer, self._pull), frames, strict=True):
            while True:
                try:
                    received.append(reader.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break
        return frames[1]

    async def leave(self) -> None:
        """Go when the core has heard all that was said: what it has not read when the PULL is
        gone, it takes for a stranger's."""
        if self._joins:
            await self.send(self._encode(GetStats(LAST_CALL)))
            async with asyncio.timeout(SETTLE_S):
                while not any(map(_is_last_reply, self.read())):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)  # its socket is not the event loop's
            await self.send(self._encode(Goodbye()))
        await asyncio.to_thread(self._context.destroy, 5000)


def _is_last_reply(frame: bytes) -> bool:
    message = core_message_decoder().decode(frame)
    return isinstance(message, ControlReply) and message.call == LAST_CALL


class BadFrames:
    """Makes frames for a core, and counts those that it must count."""

    def __init__(self, seed: int) -> None:
        self._mutator = FrameMutator(FROM_CLIENT, Random(seed))
        self._decode = client_message_decoder().decode
        self.num_bad = 0

    def next_for(self, *, joined: bool) -> bytes:
        """The next frame of a client that has, or has not, said Hello."""
        while True:
            frame = self._mutator.frame()
            try:
                message = self._decode(frame)
            except BadFrameError:
                self.num_bad += 1
                return frame
            if isinstance(message, Hello | Goodbye | Drain):
                # Whoever has left is a stranger: what follows would not be counted here. And a
                # core does drain when it is told to.
                continue
            self.num_bad += not joined
            return frame


async def fuzz_core_socket(num_frames: int, seed: int) -> str:
    """Hostile clients at a core's ROUTER while a good client streams; what is to be said of it."""
    dice, frames = Random(seed), BadFrames(seed)
    async with live_core() as (address, process, engine):
        good = GoodClient(engine)
        good.begin()
        core = psutil.Process(process.process_id)
        warm_bytes = 0
        hostile: HostileClient | None = None
        joins = False
        since = time.monotonic()
        for number in range(num_frames):
            if number % FRAMES_PER_LIFE == 0:
                if hostile is not None:
                    await hostile.leave()
                joins = dice.random() < 0.6
                hostile = HostileClient(address, joins=joins)
                _knock(address, dice)
            if number == num_frames // 5:
                warm_bytes = core.memory_info().rss
            assert hostile is not None
            await hostile.send(frames.next_for(joined=joins))
            if number % TURN_FRAMES == 0:
                hostile.read()
                await asyncio.sleep(0)
        assert hostile is not None
        await hostile.leave()
        seconds = time.monotonic() - since
        num_counted = await _settled(engine, frames.num_bad)
        grown_mib = (core.memory_info().rss - warm_bytes) / 2**20
        await good.end()
    assert num_counted == frames.num_bad, f"{num_counted} counted, {frames.num_bad} were bad"
    return (
        f"core: {num_frames} frames in {seconds:.0f} s (seed {seed}), {num_counted} bad ones, all "
        f"counted; the core grew by {grown_mib:.1f} MiB after the first fifth; {good}"
    )


async def _settled(engine: AsyncLLMEngine, expected: int) -> int:
    """How many bad frames the core has counted, once it has read all."""
    async with asyncio.timeout(SETTLE_S):
        # Asking takes a round trip: there is nothing else to wait for.
        while (stats := await engine.get_stats()).num_bad_messages < expected:
            pass
        while (stats := await engine.get_stats()).num_running > NUM_GOOD_STREAMS:
            pass
    return stats.num_bad_messages


def _knock(address: str, dice: Random) -> None:
    """Somebody who begins to speak ZMTP, and goes on with noise. (All noise would be a message of
    ZMTP 1.0 now and then, and be counted.)"""
    noise = b"\xff" + bytes(8) + b"\x7f" + dice.randbytes(dice.choice((0, 1, 10, 64, 4096)))
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(0.1)
        try:
            stranger.connect(address.removeprefix("ipc://"))
            stranger.sendall(noise)
        except OSError:
            pass  # it has hung up


async def fuzz_client_socket(num_frames: int, seed: int) -> str:
    """A stranger at the PULL of a client that streams; what is to be said of it."""
    mutator, decode = FrameMutator(FROM_CORE, Random(seed)), core_message_decoder().decode
    async with live_core() as (address, _, engine):
        good = GoodClient(engine)
        [endpoint] = Path(address.removeprefix("ipc://")).parent.glob(
            "engine.sock." + 11 * "[0-9a-f]"
        )
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        push = context.socket(zmq.PUSH)
        push.connect(f"ipc://{endpoint}")
        good.begin()
        own = psutil.Process(os.getpid())
        warm_bytes = num_bad = 0
        since = time.monotonic()
        for number in range(num_frames):
            if number == num_frames // 5:
                warm_bytes = own.memory_info().rss
            while True:
                frame = mutator.frame()
                try:
                    # What another core said would be dropped; what names no epoch, believed.
                    if isinstance(decode(frame), StepOutputs):
                        break
                except BadFrameError:
                    num_bad += 1
                    break
            while True:
                try:
                    push.send(frame, zmq.NOBLOCK)
                    break
                except zmq.Again:
                    await asyncio.sleep(0.001)
            if number % TURN_FRAMES == 0:
                await asyncio.sleep(0)
        seconds = time.monotonic() - since
        await good.end()
        context.destroy(linger=0)
        grown_mib = (own.memory_info().rss - warm_bytes) / 2**20
    return (
        f"client: {num_frames} frames in {seconds:.0f} s (seed {seed}), {num_bad} bad ones; it "
        f"grew by {grown_mib:.1f} MiB after the first fifth; {good}"
    )
