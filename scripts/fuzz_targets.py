"""What reads frames, without the sockets: decoders, and what takes the messages that they make."""

from collections.abc import Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from footplate.backend.engine_core import EngineCore
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend import RequestMetrics, SamplingParams
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.output_text import OutputText
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings, load_tokenizer
from footplate.protocol.codec import (
    BadFrameError,
    Decoder,
    Encoder,
    client_message_decoder,
    core_message_decoder,
    handle_of,
)
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.errors import FootplateError
from footplate.protocol.messages import (
    ClientMessage,
    CoreMessage,
    Goodbye,
    Hello,
    Message,
    Ping,
    StepOutputs,
)
from hostile_frames import EPOCH, FROM_CLIENT, FROM_CORE, FrameMutator

NUM_BLOCKS = 512
CLIENT, SESSION = b"client", b"session"
PROMPT = [20, 21, 22]
M = TypeVar("M", bound=Message)


@dataclass
class Tally:
    """What has become of frames.

    Attributes:
        bad: no messages.
        messages: in every way.
        nonsense: messages that were refused as a whole (columns that do not fit together).
    """

    bad: int = 0
    messages: int = 0
    nonsense: int = 0

    def __str__(self) -> str:
        return f"{self.bad} bad frames, {self.messages} messages, {self.nonsense} of them nonsense"


class Target(Generic[M]):
    """Owns a mutator, a decoder and what stands behind it."""

    name = ""

    def __init__(self, mutator: FrameMutator, decoder: Decoder[M]) -> None:
        self.tally = Tally()
        self._mutator = mutator
        self._decoder = decoder
        self._encode = Encoder().encode

    def take_next(self) -> None:
        """One more frame. Raises what nobody has promised to raise."""
        frame = self._mutator.frame()
        try:
            message = self._decoder.decode(frame)
        except BadFrameError:
            self.tally.bad += 1
            self.on_bad(frame)
            return
        self.tally.messages += 1
        # A message is one also on its way back. Compared as bytes: a float may be NaN.
        again = self._encode(message)
        assert self._encode(self._decoder.decode(again)) == again
        self.on_message(message)

    def on_bad(self, frame: bytes) -> None:
        """A frame that is no message."""

    def on_message(self, message: M) -> None:
        """A message."""

    def check(self) -> None:
        """Assert that nothing is left of what has come."""


class CoreTarget(Target[ClientMessage]):
    """A whole `EngineCore` with the fake model, stepped now and then."""

    name = "core"

    def __init__(self, dice: Random) -> None:
        super().__init__(FrameMutator(FROM_CLIENT, dice), client_message_decoder())
        self._dice = dice
        self._now = 0.0
        self._decode_back = core_message_decoder().decode
        self._make_core()

    def _make_core(self) -> None:
        cache = CacheConfig(num_gpu_blocks_override=NUM_BLOCKS)
        self.core = EngineCore(
            FakeModelRunner(ModelConfig(model="fake"), cache, DEMO_MODEL),
            cache,
            SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
            EPOCH,
            clock=lambda: self._now,
        )
        self.core.join(CLIENT, SESSION)

    def on_bad(self, frame: bytes) -> None:
        if (handle := handle_of(frame)) is not None:
            self.core.refuse(CLIENT, handle, "unreadable")
            self._tell()

    def on_message(self, message: ClientMessage) -> None:
        match message:
            case Hello() | Goodbye() | Ping():
                pass  # the inbox keeps these to itself
            case _:
                if reply := self.core.handle(CLIENT, message):
                    self._decode_back(self._encode(reply))
        if self._dice.random() < 0.3:
            self._now += 0.01
            self.core.step()
        self._tell()
        # A core that drains takes nothing more, and there would be nothing to find.
        if self.core.is_draining or self._dice.random() < 0.002:
            self.check()

    def _tell(self) -> None:
        for _, message in (*self.core.take_replies(), *self.core.take_outputs()):
            self._decode_back(self._encode(message))

    def check(self) -> None:
        core = self.core
        core.check_ledger()
        core.leave(CLIENT)
        core.step()  # lets go of what the runner held
        core.check_ledger()
        stats = core.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == NUM_BLOCKS
        self._make_core()


class ClientTarget(Target[CoreMessage]):
    """An `EngineClient` with a few streams of different kinds, which are read now and then."""

    name = "client"

    def __init__(self, dice: Random) -> None:
        super().__init__(FrameMutator(FROM_CORE, dice), core_message_decoder())
        self._dice = dice
        self._tokenizer = load_tokenizer(DEMO_MODEL)
        self._open_streams()

    def _open_streams(self) -> None:
        self.client = EngineClient()
        self._streams: list[RequestStream] = []
        # Handles 1 to 8, which the samples name.
        self._open(SamplingParams())
        self._open(SamplingParams(stop=("yz", "cde")))
        self._open(SamplingParams(logprobs=1, logprob_token_ids=[17]))
        self._open(SamplingParams(n=3))
        self._open(SamplingParams(prompt_logprobs=0))
        self._open(SamplingParams(prompt_logprobs=0, logprobs=0, stop=("q",)))

    def _open(self, params: SamplingParams) -> None:
        first = self.client.new_handles(params.n)
        metrics = RequestMetrics(0.0, 0.0)
        stream = RequestStream(str(first), first, params, 0, metrics, self._abandon)
        stops = StopStrings(tuple(params.stop)) if params.stop else None
        tokenizer = self._tokenizer
        stream.begin(
            None,
            PROMPT,
            lambda: OutputText(tokenizer.detokenizer(PROMPT), stops),
            tokenizer.text_of_token,
        )
        self.client.open(stream)
        self._streams.append(stream)

    def _abandon(self, stream: RequestStream) -> None:
        self.client.abort([stream.request_id])

    def on_message(self, message: CoreMessage) -> None:
        if not isinstance(message, StepOutputs):
            return
        try:
            over = self.client.handle(message, 0.0)
        except ValueError:
            self.tally.nonsense += 1
            self.check()
            return
        assert all(isinstance(handle, int) for handle in over)
        if self._dice.random() < 0.3:
            self._read()
        if self.client.num_live < 3:
            self.check()

    def _read(self) -> None:
        for stream in self._streams:
            try:
                while take_now(anext(stream)):
                    pass
            except (FootplateError, StopAsyncIteration):
                pass

    def check(self) -> None:
        self._read()
        for stream in self._streams:
            stream.close()
        assert self.client.num_live == 0
        assert (self.client.waiting.num_reqs, self.client.waiting.num_tokens) == (0, 0)
        self._open_streams()


def take_now(coroutine: Coroutine[Any, Any, object]) -> object:
    """What a coroutine returns, if it does so without waiting; else None."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    return None
