"""The engine-core process: what it holds on to from start to end, and the busy loop.

Order matters. The death line is watched first, so that no phase of start-up outlives the parent.
The address is taken before anything slow is loaded, so that a second core on it fails at once. A
standby takes it last: it is another's until that one is dead.
"""

import gc
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import cast

import msgspec
import zmq

from footplate.backend import fail_points
from footplate.backend.address import name_listener
from footplate.backend.background import Background
from footplate.backend.cause import describe_cause
from footplate.backend.discretion import without_places
from footplate.backend.engine_core import ClientId, EngineCore
from footplate.backend.flight_recorder import FlightRecorder, RecordedRunner, read_suspects
from footplate.backend.inbox import Forbidden, Inbox, Joined, Left, Unreadable
from footplate.backend.logits.processor import load_processors
from footplate.backend.outbox import Outbox
from footplate.backend.parent_line import ParentLine
from footplate.backend.pulse import Pulse
from footplate.backend.runner.load import prepare_runner
from footplate.backend.step import MakeRunner, OnProgress
from footplate.backend.structured.compiler import GrammarCompiler
from footplate.backend.structured.interface import GrammarEngine
from footplate.backend.termination import Terminated
from footplate.protocol.codec import Encoder
from footplate.protocol.config import CoreConfig
from footplate.protocol.errors import AddressInUseError, EngineStartError, FootplateError
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    STANDING_BY,
    AttachRequest,
    ControlReply,
    EngineFailed,
    EngineStopping,
    GetStats,
    Goodbye,
    Hello,
    Message,
    ModelFacts,
    Ping,
    Progress,
    Refused,
    StepOutputs,
    Welcome,
)

logger = logging.getLogger(__name__)

BACKLOG_RETRY_S = 0.002
# No other core is waiting for this one to end, and what clients do not hear now they never will.
FAREWELL_S = 3.0
# A deadline may be further away than the operating system can wait (some 292 years).
LONGEST_SLEEP_S = 3600.0


def run_core(
    config: CoreConfig, parent: ParentLine, background: Background, asked_at: float
) -> None:
    """Serve until the parent is gone, a signal comes, or the engine fails. A standby waits before
    that, with its model loaded, until it is promoted.

    Args:
        background: in which a standby loads; over when it is promoted.
        asked_at: when somebody wanted this core, in monotonic seconds.

    Raises:
        AddressInUseError: another process holds the address.
        Exception: whatever made loading or the loop fail, after clients have been told.
    """
    if fail_points.ENABLED:
        logger.warning("%s is set: this core will fail on purpose", fail_points.VARIABLE)
        fail_points.reach("start.begun")
    loaded = None
    if config.is_standby:
        config, loaded = _stand_by(config, parent, background)
    files = parent.files
    try:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pulse, outbox = Pulse(), Outbox(config.max_unread_bytes)
        core: EngineCore | None = None
        with files.claim_address():
            suspects = read_suspects(files.steps)
            recorder = FlightRecorder(files.steps, config.scheduler.max_num_seqs)
            try:
                inbox = Inbox(context, config.address, pulse, suspects, config.security)
            except zmq.ZMQError as error:
                raise AddressInUseError(
                    f"cannot listen on {config.address}: {error}{name_listener(config.address)}"
                ) from None
        # From here on there may be clients: whatever ends this core, they are told.
        try:
            if fail_points.ENABLED:
                fail_points.reach("start.bound")
            core = _start(config, inbox, recorder, asked_at, loaded)
            run_busy_loop(core, inbox, outbox, pulse, recorder)
        except Terminated:
            reason = "the engine was told to end"
            inbox.announce(Refused("start", reason))
            if core is not None and core.is_draining:
                # It was emptied first, so nobody is going to start another in its place.
                last_word = Encoder().encode(EngineStopping(reason))
                outbox.broadcast(last_word, last_word, FAREWELL_S)
            raise
        except Exception as error:
            if not recorder.is_clear:
                files.keep_steps()
            # Whoever still waits for a Welcome hears it from the inbox, the others from the outbox.
            cause, encode = root_cause(error), Encoder().encode
            inbox.announce(Refused("start", cause))
            discreetly = EngineFailed(without_places(cause))
            outbox.broadcast(encode(EngineFailed(cause)), encode(discreetly))
            raise
        finally:
            # The inbox first: it looks at the monitors of the outbox's sockets.
            inbox_ended = inbox.close()
            outbox.close()
            if inbox_ended:
                # Closes what nobody has taken over (the socket of a client that came just now),
                # and delivers what the sockets still hold, within their linger time.
                context.destroy()
    finally:
        files.remove()


def root_cause(error: BaseException) -> str:
    """One line that says what went wrong, for people who do not have this process's traceback."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, FootplateError) else f"{type(error).__name__}: {text}"


def _stand_by(
    config: CoreConfig, parent: ParentLine, background: Background
) -> tuple[CoreConfig, MakeRunner]:
    """Load without haste, and wait; return how to serve, and with what."""

    def load() -> MakeRunner:
        return _load(config, lambda phase, fraction: parent.say(Progress(phase, fraction)))

    loaded = background.call(load)
    parent.say(Progress(STANDING_BY, 1.0))
    promotion = parent.wait_for_promotion()
    for what, ours, wanted in (
        ("model", config.model, promotion.model),
        ("block_size", config.cache.block_size, promotion.cache.block_size),
        (
            "logits_processors",
            config.requests.logits_processors,
            promotion.requests.logits_processors,
        ),
    ):
        if ours != wanted:
            raise EngineStartError(f"a standby with {what} {ours} cannot serve {wanted}")
    return promotion, loaded


def _load(config: CoreConfig, on_progress: OnProgress) -> MakeRunner:
    # The collector would look again and again at objects that live for ever: a third of the time
    # of imports, and half of that of loading weights.
    gc.disable()
    # First: a wrong name is found before a large model has been loaded.
    processors = load_processors(config.requests.logits_processors)
    return prepare_runner(
        config.model,
        config.cache,
        on_progress,
        processors,
        is_standby=config.is_standby,
        weights_file=config.weights_file,
    )


def _start(
    config: CoreConfig,
    inbox: Inbox,
    recorder: FlightRecorder,
    asked_at: float,
    loaded: MakeRunner | None = None,
) -> EngineCore:
    """Everything from a bound address to a core that is ready.

    Args:
        loaded: what a standby has made ready.
    """
    phases = _PhaseTimer(inbox.announce, asked_at)
    make_runner = loaded or _load(config, phases.enter)
    runner = make_runner(config.cache, config.scheduler, phases.enter)
    if fail_points.ENABLED:
        fail_points.reach("start.loaded")
    core = EngineCore(
        RecordedRunner(runner, recorder),
        config.cache,
        config.scheduler,
        epoch=secrets.randbits(63),
        clock=time.monotonic,
        requests=config.requests,
        grammars=_grammar_compiler(runner.facts.model, inbox.wake),
        has_suspects=config.has_crashed,
    )
    welcome = Welcome(
        epoch=core.epoch,
        version=PROTOCOL_VERSION,
        model=core.model,
        limits=core.limits,
        process_id=os.getpid(),
        phases=phases.finish(),
        requests=config.requests,
        has_crashed=config.has_crashed,
        weights_version=config.weights_version,
    )
    gc.freeze()  # nor need it do so later
    gc.enable()
    inbox.announce(welcome)
    logger.info("ready: %s on %s", core.model.model, config.address)
    return core


def _grammar_compiler(model: ModelFacts, wake: Callable[[], None]) -> GrammarCompiler:
    def make_llguidance() -> GrammarEngine:
        from footplate.backend.structured.llguidance_engine import LlguidanceEngine

        return LlguidanceEngine(model.tokenizer, model.vocab_size, model.eos_token_ids)

    return GrammarCompiler({"llguidance": make_llguidance}, wake)


def run_busy_loop(
    core: EngineCore, inbox: Inbox, outbox: Outbox, pulse: Pulse, recorder: FlightRecorder
) -> None:
    """Drive `core` for ever. Sleeps only when there is nothing to do: between two steps a
    blocking receive would add its wake-up latency to every token."""
    voice = _Voice(core, inbox, outbox)
    while True:
        if not core.has_work:
            recorder.clear()
        events = inbox.take(_patience(core, outbox))
        # All but waiting counts: a loop may hang in a message or in a socket as well.
        pulse.begin()
        for client, event in events:
            match event:
                case Joined(push=push, session=session, peer=peer):
                    outbox.join(client, push, peer.is_insider)
                    recorder.join(client, session)
                    core.join(client, session, peer)
                case Left(for_good=for_good):
                    core.leave(client, may_return=not for_good)
                    recorder.leave(client)
                    outbox.leave(client)
                case Unreadable(handle=handle, why=why):
                    core.refuse(client, handle, why)
                case Forbidden(call=call, why=why):
                    voice.tell(client, ControlReply(call, False, why))
                case Hello() | Goodbye() | Ping():
                    raise AssertionError("the inbox keeps these to itself")
                case GetStats(call=call):
                    # Only here the core's books and the inbox's come together.
                    stats = core.stats(inbox.num_bad_messages, inbox.num_rejected_peers)
                    voice.tell(client, ControlReply(call, True, stats=stats))
                case _:
                    if isinstance(event, AttachRequest):
                        recorder.renew()  # it may become another client's
                    if answer := core.handle(client, event):
                        voice.tell(client, answer)
        core.step()
        for client, reply in core.take_replies(outbox.has_backlog):
            voice.tell(client, reply)
        to_send = core.take_outputs()
        if fail_points.ENABLED and to_send:
            fail_points.reach("core.outputs")
        for client, outputs in to_send:
            voice.tell(client, outputs)
        if fail_points.ENABLED and to_send:
            fail_points.reach("core.sent")
        if outbox.has_backlog:
            outbox.flush()
        pulse.end()


class _Voice:
    """Tells clients what they are to be told; one that cannot be told is served no longer."""

    def __init__(self, core: EngineCore, inbox: Inbox, outbox: Outbox) -> None:
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._encoder = Encoder()

    def tell(self, client: ClientId, message: Message) -> None:
        """Send one message, or keep it until there is room."""
        has_words = isinstance(message, StepOutputs) and bool(message.finished)
        if has_words and not self._outbox.is_insider(client):
            message = _discreetly(cast(StepOutputs, message))
        try:
            frame = self._encoder.encode(message)
        except Exception as error:  # too large, or with a value that no message holds
            logger.exception("a %s cannot be encoded", type(message).__name__)
            self._dismiss(client, f"its output cannot be sent: {describe_cause(error)}")
            return
        if not self._outbox.send(client, frame):
            self._dismiss(client, "the client left too much of its output unread")

    def _dismiss(self, client: ClientId, reason: str) -> None:
        self._core.leave(client, may_return=True)
        self._inbox.dismiss(client, reason)


def _discreetly(outputs: StepOutputs) -> StepOutputs:
    ends = [
        msgspec.structs.replace(end, message=without_places(end.message))
        for end in outputs.finished
    ]
    return msgspec.structs.replace(outputs, finished=ends)


def _patience(core: EngineCore, outbox: Outbox) -> float | None:
    if core.has_work:
        return 0
    has_backlog = outbox.has_backlog
    if core.is_drained and not has_backlog:
        return 0
    deadline_s = core.seconds_to_deadline
    waits = (
        BACKLOG_RETRY_S if has_backlog else None,
        None if deadline_s is None else min(deadline_s, LONGEST_SLEEP_S),
    )
    return min((seconds for seconds in waits if seconds is not None), default=None)


class _PhaseTimer:
    """Times the phases of start-up and announces each of them."""

    def __init__(self, announce: Callable[[Progress], None], since: float) -> None:
        self._announce = announce
        self._seconds: dict[str, float] = {}
        self._phase = "importing"
        self._since = since

    def enter(self, phase: str, fraction: float) -> None:
        """A phase begins, or has come as far as `fraction` (0 to 1)."""
        if phase != self._phase:
            self._close()
            self._phase = phase
            if fail_points.ENABLED:
                fail_points.reach(f"start.{phase.replace(' ', '_')}")
        self._announce(Progress(phase, fraction))

    def finish(self) -> dict[str, float]:
        """Seconds that each phase took."""
        self._close()
        return self._seconds

    def _close(self) -> None:
        now = time.monotonic()
        self._seconds[self._phase] = round(now - self._since, 3)
        self._since = now
