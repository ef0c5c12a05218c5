"""One engine-core process of the simulation: a real `EngineCore`, and what inbox, outbox, pulse and
flight recorder do around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from footplate.backend.engine_core import EngineCore
from footplate.backend.request import Request
from footplate.backend.step import RunnerFacts, StepPlan, StepResult
from footplate.backend.structured.interface import CompiledGrammar, GrammarError, Matcher
from footplate.protocol.config import CacheConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Goodbye,
    Hello,
    ModelFacts,
    Ping,
    Pong,
    StepOutputs,
    Welcome,
)
from footplate.protocol.token_params import Grammar

from .checking_runner import CheckingRunner
from .link import Link, decode_of_client, session_of
from .marks import Marks

# What a salt says of a request whose steps no core survives.
POISON = "poison"
BAD_GRAMMAR = Grammar("bad")


class CoreCrash(BaseException):
    """The process is gone, in the middle of a step. Nothing in it can catch that."""


class StreamMarks(Marks):
    """Marks of a request, whichever connection it comes by and however much output with it. Its
    grammar is its own, and the same in every core."""

    def is_complete_at(
        self, client: bytes, handle: int, position: int, grammar: Grammar | None
    ) -> bool:
        """See `Marks`."""
        return grammar is not None and exact_length(grammar) == position + 1

    def is_complete_before(
        self, client: bytes, handle: int, position: int, grammar: Grammar | None
    ) -> bool:
        """See `Marks`."""
        return grammar is not None and exact_length(grammar) == position

    def _place(self, client: bytes, handle: int, position: int) -> int:
        return super()._place(session_of(client), handle, position)


class MortalRunner(CheckingRunner):
    """A checking runner that does not survive a poisonous request.

    Attributes:
        participants: of the last step that has begun.
    """

    participants: tuple[Request, ...] = ()

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        self.participants = tuple(plan.requests)
        if any(request.cache_salt == POISON for request in plan.requests):
            raise CoreCrash
        return super().execute(plan)


def grammar_of(length: int) -> Grammar:
    """Any output of so many tokens, and none of another length."""
    return Grammar(str(length))


def exact_length(grammar: Grammar) -> int:
    """Of the outputs that it allows; 0 where it is no grammar."""
    return 0 if grammar == BAD_GRAMMAR else int(grammar.text)


@dataclass
class ExactLength:
    """Such a grammar, compiled, and its own matcher."""

    num_left: int

    def start(self) -> Matcher:
        """See `CompiledGrammar`."""
        return ExactLength(self.num_left)

    def advance(self, token_ids: Sequence[int]) -> bool:
        """See `Matcher`."""
        self.num_left -= len(token_ids)
        if self.num_left < 0:
            raise GrammarError("it is too long")
        return not self.num_left

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """No runner of the simulation asks for one."""
        raise AssertionError


class SlowCompiler:
    """Compiles grammars, some of them later."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._under_way: list[tuple[int, CompiledGrammar | GrammarError]] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def submit(self, key: int, grammar: Grammar) -> CompiledGrammar | None:
        """See `CompilesGrammars`."""
        if grammar == BAD_GRAMMAR:
            self._under_way.append((key, GrammarError("as the test has it")))
        elif self._random.random() < 0.5:
            self._under_way.append((key, ExactLength(exact_length(grammar))))
        else:
            return ExactLength(exact_length(grammar))
        return None

    def take_finished(self) -> list[tuple[int, CompiledGrammar | GrammarError]]:
        """See `CompilesGrammars`."""
        finished = [each for each in self._under_way if self._random.random() < 0.6]
        self._under_way = [each for each in self._under_way if each not in finished]
        return finished


@dataclass(frozen=True)
class Setting:
    """What is the same for every core of a run."""

    model: ModelFacts
    num_blocks: int
    max_scored_rows: int
    cache: CacheConfig
    scheduler: SchedulerConfig
    requests: RequestConfig
    marks: StreamMarks


@dataclass
class Obituary:
    """What is known of a core that has ended."""

    suspects: dict[bytes, list[int]] = field(default_factory=dict)  # by session
    has_crashed: bool = False


class CoreHost:
    """Owns one core. Its two threads are two ways in: `hear` is the inbox thread's, `begin_step`
    and `end_step` are the busy loop's; nothing comes in while the process is stopped.

    Attributes:
        is_stopped: by a signal, until it is told to go on.
        is_hung: for ever in the step it is in.
    """

    def __init__(
        self,
        setting: Setting,
        epoch: int,
        clock: Callable[[], float],
        random: Random,
        last: Obituary,
    ) -> None:
        self.epoch = epoch
        self.is_stopped = False
        self.is_hung = False
        self._clock = clock
        self._random = random
        self._last = last
        self._setting = setting
        scheduler = setting.scheduler
        self.runner = MortalRunner(
            RunnerFacts(setting.model, setting.num_blocks, True, setting.max_scored_rows),
            setting.cache.block_size,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            scheduler.long_prefill_token_threshold,
            may_displace=scheduler.policy == "priority",
            marks=setting.marks,
        )
        self._compiler = SlowCompiler(random)
        self.core = EngineCore(
            self.runner,
            setting.cache,
            scheduler,
            epoch,
            clock,
            requests=setting.requests,
            grammars=self._compiler,
        )
        self._links: dict[bytes, Link] = {}
        self._events: list[tuple[bytes, Hello | Goodbye | AddRequest | AbortRequests]] = []
        self._produced: list[tuple[bytes, StepOutputs]] | None = None
        self.num_steps = 0

    # ---- the inbox's thread

    def hear(self, link: Link) -> Hello | Goodbye | Ping | AddRequest | AbortRequests:
        """Take one frame from a client."""
        _, frame = link.to_core.popleft()
        message = decode_of_client(frame)
        client = link.routing_id
        match message:
            case Hello():
                link.host = self
                link.answer(self._welcome(message))
                if client not in self._links:
                    self._links[client] = link
                    self._events.append((client, message))
            case Ping(number=number):
                pong = Pong(number, self.epoch, self.num_steps, self.is_in_step, 0.0)
                link.answer(pong)
            case Goodbye():
                self.notice_gone(link)
            case AddRequest() | AbortRequests():
                if client in self._links:
                    self._events.append((client, message))
            case _:
                raise AssertionError(f"no client of the simulation says {message}")
        return message

    def notice_gone(self, link: Link) -> None:
        """A client's sockets are closed; it may have said so itself."""
        if self._links.pop(link.routing_id, None) is not None:
            self._events.append((link.routing_id, Goodbye()))

    def _welcome(self, hello: Hello) -> Welcome:
        return Welcome(
            self.epoch,
            PROTOCOL_VERSION,
            self.core.model,
            self.core.limits,
            self.epoch,
            {},
            self._setting.requests,
            self._last.suspects.get(hello.session, []),
            self._last.has_crashed,
            num_suspects=sum(map(len, self._last.suspects.values())),
        )

    # ---- the busy loop

    @property
    def is_in_step(self) -> bool:
        """Whether the busy loop is inside a step."""
        return self._produced is not None

    @property
    def is_poisoned(self) -> bool:
        """Whether the step it is in is one that no core survives."""
        return any(request.cache_salt == POISON for request in self.runner.participants)

    @property
    def has_work(self) -> bool:
        """Whether the busy loop has anything to do now."""
        return bool(self._events or self.core.has_work or self._compiler)

    def begin_step(self) -> None:
        """Apply what has come and compute a step; nobody hears of it yet.

        Raises:
            CoreCrash: this process is gone.
        """
        assert self._produced is None
        self.num_steps += 1
        self._produced = []
        events, self._events = self._events, []
        for client, message in events:
            self._apply(client, message)
        self.runner.participants = ()
        self.core.step()
        self._produced = self.core.take_outputs()

    def _apply(self, client: bytes, message: Hello | Goodbye | AddRequest | AbortRequests) -> None:
        match message:
            case Hello():
                self.core.join(client)
            case Goodbye():
                self.core.leave(client)
                self.runner.forget(client)
            case AddRequest() | AbortRequests():
                self.core.handle(client, message)

    def end_step(self, most: int | None = None) -> None:
        """Tell clients what it has brought; only the first `most` of them, if it dies then."""
        assert self._produced is not None
        produced, self._produced = self._produced, None
        for client, outputs in produced[:most]:
            if link := self._links.get(client):
                for part in self._in_parts(outputs):
                    link.push(part)

    def _in_parts(self, outputs: StepOutputs) -> list[StepOutputs]:
        """A message may be closed behind any entry when it is full, and a token may be a run."""
        chance = self._random.random()
        if chance < 0.5 and outputs.finished:
            rest = StepOutputs(outputs.epoch, [], [], [], finished=outputs.finished)
            return [replace(outputs, finished=[]), rest]
        if chance > 0.8:
            return [replace(outputs, counts=[1] * len(outputs.handles))]
        return [outputs]

    # ---- its end

    def die(self, random: Random, *, has_crashed: bool) -> Obituary:
        """End here and now. What it was doing is on record."""
        suspects: dict[bytes, list[int]] = {}
        if self.is_in_step or random.random() < 0.5:  # between steps, the record may be late
            for request in self.runner.participants:
                suspects.setdefault(session_of(request.client), []).append(request.handle)
        if self._produced:
            self.end_step(random.randint(0, len(self._produced)))
        for link in self._links.values():
            link.cut(random)
        return Obituary(suspects, has_crashed)

    def check_ledger(self, names: set[bytes]) -> None:
        """With nothing left to do, nothing is left. `names` are the connections there are."""
        assert not self.has_work and not self.is_in_step
        assert self._links.keys() == names
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == self._setting.num_blocks
        assert not self.runner.lengths, "the runner was not told to let go"
        self.core.check_ledger()
