"""The engine core as a process: how it ends, what it says then, and what it leaves behind."""

import asyncio
import os
import queue
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams, core_process
from footplate.frontend.core_process import CoreProcess
from footplate.protocol.codec import MAX_FRAMES, Encoder
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import (
    EngineDeadError,
    EngineStartError,
    ProtocolMismatchError,
)
from footplate.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    ControlReply,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Goodbye,
    Hello,
    Progress,
    Refused,
    StepOutputs,
    Welcome,
)
from footplate.protocol.token_params import Grammar, TokenParams

from .conftest import HERE, PATIENCE_S, Core, Program, StartCore, files_in, in_time, is_gone
from .raw_client import raw_client

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
SHORT = SamplingParams(max_tokens=5, detokenize=False)
PROMPT = [20, 21]
Run = Callable[..., Program]


async def complete(engine: AsyncLLMEngine, params: SamplingParams = SHORT) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        outputs = [output async for output in engine.generate(PROMPT, params)]
    return outputs[-1].outputs[0].token_ids


async def error_of(awaitable: Any) -> BaseException | None:
    """What an ending is, within the patience of a test."""
    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(awaitable, return_exceptions=True)
    return outcomes[0] if isinstance(outcomes[0], BaseException) else None


def wait_until_ready(core: Core) -> None:
    """A start takes as long as it takes: clients have little patience in some of these tests."""
    with raw_client(core.address) as client:
        client.join()


# ---- a start that fails


async def start_error(**engine_args: Any) -> str:
    engine = AsyncLLMEngine(EngineArgs(**engine_args))
    error = await error_of(engine.start())
    assert isinstance(error, EngineStartError)
    return str(error)


async def test_a_model_folder_that_is_not_there_is_the_error(folder: Path) -> None:
    assert await start_error(model=f"{folder}/nowhere") == f"{folder}/nowhere does not exist"


async def test_settings_that_contradict_each_other_are_the_error() -> None:
    message = await start_error(model="fake", max_model_len=99, num_gpu_blocks_override=1)
    assert message.startswith("ValueError: max_model_len=99 does not fit into 1 KV blocks of 16")


def test_a_logits_processor_that_cannot_be_loaded_is_the_error(folder: Path) -> None:
    private = folder / "core"
    private.mkdir(mode=0o700)
    config = msgspec.structs.replace(
        EngineArgs(model="fake").core_config(f"ipc://{private}/engine.sock", str(private)),
        requests=RequestConfig(logits_processors=("no_such_package.module:Class",)),
    )
    ends: queue.Queue[EngineStartError] = queue.Queue()
    process = CoreProcess(config, ends.put)
    try:
        message = str(ends.get(timeout=PATIENCE_S))
    finally:
        process.stop()
    assert message.startswith("logits processor 'no_such_package.module:Class' cannot be loaded")


def test_the_root_cause_is_told_without_what_libraries_print(start_core: StartCore) -> None:
    core = start_core("load raises")
    error = core.end()
    assert type(error) is EngineStartError
    assert str(error) == "ValueError: no weights in the folder"
    assert core.process.exit_status == os.EX_SOFTWARE
    assert "engine.sock" not in files_in(core.folder)


def test_what_the_user_has_to_put_right_has_an_exit_status_of_its_own(
    start_core: StartCore,
) -> None:
    core = start_core("load refuses")
    assert str(core.end()) == "the weights are damaged"
    assert core.process.exit_status == os.EX_CONFIG


async def test_a_client_that_waits_for_a_start_hears_why_it_failed(
    start_core: StartCore,
) -> None:
    core = start_core("step waits")
    core.process.stop()
    # Nobody is left to refuse it; the folder went with the core, or goes with its owner if that had
    # to end it the hard way.
    shutil.rmtree(core.folder, ignore_errors=True)
    engine = AsyncLLMEngine.connect(core.address)
    assert "no engine listens" in str(await error_of(engine.start()))


@pytest.mark.parametrize(
    "stdin", [b"", b"\x01", struct.pack("<I", 9), struct.pack("<I", 3) + b"\xc1\xc1\xc1"]
)
def test_a_core_without_configuration_ends_at_once_and_says_so(stdin: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "footplate.backend.main"],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode != 0
    assert done.stdout == b""
    assert b"configuration" in done.stderr


def test_a_fork_server_without_a_supervisor_ends_at_once_and_says_so() -> None:
    command = [sys.executable, "-m", "footplate.backend"]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert b"started by a supervisor" in done.stderr


def test_a_core_that_dies_of_a_signal_while_it_starts_is_explained(
    start_core: StartCore,
) -> None:
    core = start_core("load waits")
    os.kill(core.process.process_id, signal.SIGSEGV)
    assert "SIGSEGV" in str(core.end())


@pytest.mark.parametrize("moment", [None, "engine.sock.lock", "engine.sock"])
def test_a_core_that_is_stopped_while_it_starts_leaves_nothing(
    folder: Path, moment: str | None
) -> None:
    config = EngineArgs(model="fake").core_config(f"ipc://{folder}/engine.sock")
    for _ in range(5):
        process = CoreProcess(config, lambda error: None)
        assert moment is None or in_time(lambda: moment in files_in(folder))
        process.stop()
        assert files_in(folder) == []


# ---- a death in service


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_killed_core_that_is_not_replaced_is_reported_by_the_signals_name(
    number: signal.Signals,
) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake", max_restarts=0))
    streams = [await engine.add_request(None, PROMPT, FOREVER) for _ in range(10)]
    for stream in streams:
        await anext(stream)
    assert engine.process_id is not None
    killed_at = time.monotonic()
    os.kill(engine.process_id, number)

    async def drain(stream: Any) -> None:
        async for _ in stream:
            pass

    endings = [*map(drain, streams), engine.get_stats(), complete(engine), engine.check_health()]
    errors = [await error_of(ending) for ending in endings]
    assert time.monotonic() - killed_at < 1
    assert set(errors) == {engine.dead_error}
    assert isinstance(engine.dead_error, EngineDeadError)
    assert number.name in str(engine.dead_error)
    assert ("out of memory" in str(engine.dead_error)) == (number == signal.SIGKILL)
    engine.shutdown()


async def test_a_killed_core_leaves_no_file_and_no_trace_in_the_next_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_s = 0.2
    monkeypatch.setattr("footplate.frontend.core_link.OWN_CORE_EXIT_S", patience_s)
    private = folder / "private"

    def make_private_dir() -> Path:
        private.mkdir(mode=0o700)
        return private

    monkeypatch.setattr("footplate.frontend.supervisor.make_private_dir", make_private_dir)
    engine = AsyncLLMEngine(EngineArgs(model="fake", max_restarts=0))
    await engine.start()
    assert files_in(folder) != []
    assert engine.process_id is not None
    os.kill(engine.process_id, signal.SIGKILL)
    assert isinstance(await error_of(engine.get_stats()), EngineDeadError)
    assert files_in(folder) == []
    # Its owner may start another, for which news of the first one's death is no news.
    engine.shutdown()
    await engine.start()
    restarted = time.monotonic()
    while time.monotonic() - restarted < 2 * patience_s:
        assert len(await complete(engine)) == 5
    engine.shutdown()
    assert files_in(folder) == []


DEVICE_LOST = "AcceleratorError: the step failed for a reason"


async def test_a_lost_device_ends_the_core_and_its_cause_reaches_every_client(
    start_core: StartCore,
) -> None:
    core = start_core("step raises")
    wait_until_ready(core)
    engines = [AsyncLLMEngine.connect(core.address, timeout_s=0.5) for _ in range(3)]
    for engine in engines:
        await engine.start()
    idle = asyncio.create_task(engines[1].get_stats())
    assert await idle
    streams = [asyncio.create_task(complete(engine, FOREVER)) for engine in engines[:2]]
    for stream in streams:
        error = await error_of(stream)
        assert isinstance(error, EngineDeadError)
        assert str(error) == f"{DEVICE_LOST}; nothing took its place within 0.5 s"
    assert str(core.end()) == DEVICE_LOST
    assert core.process.exit_status == os.EX_SOFTWARE
    assert DEVICE_LOST in str(await error_of(engines[2].get_stats()))
    assert "engine.sock" not in files_in(core.folder)
    for engine in engines:
        engine.shutdown()


async def test_a_device_that_is_lost_again_and_again_is_an_engines_cause_of_death(
    start_core: StartCore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_core("step raises").process.stop()  # leaves its program in the folder
    monkeypatch.setattr(sys, "executable", str(folder / "program0"))
    engine = AsyncLLMEngine(EngineArgs(model="fake", max_restarts=0))
    error = await error_of(complete(engine))
    assert isinstance(error, EngineDeadError)
    assert str(error).startswith(DEVICE_LOST)
    engine.shutdown()


async def test_a_client_that_came_during_the_last_step_does_not_keep_the_core_from_ending(
    start_core: StartCore,
) -> None:
    core = start_core("step waits and raises")
    wait_until_ready(core)
    early, late = (AsyncLLMEngine.connect(core.address, timeout_s=0.5) for _ in range(2))
    asking = asyncio.create_task(complete(early))
    assert await core.has_reached_gate()
    await late.start()
    calling = asyncio.create_task(late.get_stats())
    core.let_through()
    assert DEVICE_LOST in str(await error_of(asking))
    assert isinstance(await error_of(calling), EngineDeadError)
    assert DEVICE_LOST in str(await asyncio.to_thread(core.end))
    early.shutdown()
    late.shutdown()


def test_the_next_core_knows_who_took_part_in_the_step_in_which_one_was_killed(
    folder: Path,
) -> None:
    address = f"ipc://{folder}/engine.sock"
    config = EngineArgs(model="fake").core_config(address)
    endless = TokenParams(0.0, 1.0, 0, 0.0, 0, 30_000, 0, ())
    one_token = TokenParams(0.0, 1.0, 0, 0.0, 0, 1, 0, ())
    alice, bob = b"A" * 16, b"B" * 16
    ends: queue.Queue[EngineStartError] = queue.Queue()

    def suspects_of(*sessions: bytes) -> list[list[int]]:
        suspects = []
        for session in sessions:
            with raw_client(address) as client:
                suspects.append(client.join(session).suspects)
        return suspects

    first = CoreProcess(config, ends.put)
    assert in_time(lambda: (folder / "engine.sock").exists())
    with raw_client(address) as client, raw_client(address) as other:
        assert client.join(alice).suspects == other.join(bob).suspects == []
        client.say(AddRequest(4, [20], one_token), AddRequest(5, [20], endless))
        other.say(AddRequest(6, [20], endless))
        assert isinstance(client.hear_output(), StepOutputs)
        client.say(AddRequest(7, [20], endless))
        while 7 not in getattr(client.hear_output(), "handles", ()):
            pass
        os.kill(first.process_id, signal.SIGKILL)
        ends.get(timeout=PATIENCE_S)
    for number in (signal.SIGKILL, signal.SIGTERM):  # one ends before it has run a step
        heir = CoreProcess(config, ends.put)
        assert in_time(lambda: (folder / "engine.sock").exists())
        assert suspects_of(alice, bob, b"C" * 16, b"") == [[5, 7], [6], [], []]
        os.kill(heir.process_id, number)
        ends.get(timeout=PATIENCE_S)
    assert files_in(folder) == [], "an orderly end leaves no record"


def test_a_core_that_does_not_react_is_killed_after_a_while(
    start_core: StartCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_process, "STOP_TIMEOUT_S", 0.1)
    core = start_core()
    os.kill(core.process.process_id, signal.SIGSTOP)
    core.process.stop()
    core.process.stop()
    assert is_gone(core.process.process_id)
    assert core.ends.empty(), "an end that was asked for is no news"


def test_a_core_ends_with_the_object_that_stands_for_it(start_core: StartCore) -> None:
    core = start_core()
    with raw_client(core.address) as client:
        process_id = client.join().process_id
        assert process_id == core.process.process_id
        core.process._finalizer()
        assert is_gone(process_id)


def test_a_core_takes_no_notice_of_an_interrupt_and_ends_at_a_termination(
    start_core: StartCore,
) -> None:
    core = start_core()
    with raw_client(core.address) as client:
        client.join()
        os.kill(core.process.process_id, signal.SIGINT)
        client.say(GetStats(1))
        assert client.hear_output()
        os.kill(core.process.process_id, signal.SIGTERM)
        assert "143" in str(core.end())
        assert "engine.sock" not in files_in(core.folder)


# ---- the death of its owner


@pytest.mark.parametrize("moment", ["starting", "serving", "streaming"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_application_takes_its_core_and_every_file_along(
    run: Run, folder: Path, moment: str, number: signal.Signals
) -> None:
    program = run(HERE / "client_program.py", moment, folder)
    program.line_with(moment)
    # A fork server, and soon a core.
    assert in_time(lambda: program.children)
    children = program.children
    assert files_in(folder) != []
    program.signal(number)
    assert in_time(lambda: all(map(is_gone, children)), seconds=2)
    assert in_time(lambda: not files_in(folder), seconds=2), files_in(folder)
    program.status()


@pytest.mark.parametrize("what", ["forgets", "forgets an LLM"])
def test_a_program_that_forgets_its_engine_ends_without_delay_and_complaint(
    run: Run, folder: Path, what: str
) -> None:
    program = run(HERE / "client_program.py", what, folder)
    program.line_with("streaming")
    said = time.monotonic()
    assert program.status() == 0
    assert time.monotonic() - said < 2
    assert program.rest() == ""
    assert files_in(folder) == []


@pytest.mark.parametrize("what", ["forks", "forks an LLM"])
def test_a_fork_is_refused_and_costs_its_parent_nothing(run: Run, folder: Path, what: str) -> None:
    program = run(HERE / "client_program.py", what, folder)
    assert program.status() == 0
    said = program.rest()
    assert "child refused: the engine" in said
    assert "parent served\n" in said
    assert "parent served after its child's end" in said
    assert files_in(folder) == []


# ---- clients come and go


def test_a_killed_client_is_noticed_and_leaves_nothing(run: Run, start_core: StartCore) -> None:
    core = start_core()
    with raw_client(core.address) as witness:
        welcome = witness.join()
        files_before = files_in(core.folder)
        program = run(HERE / "client_program.py", "attached", core.address)
        program.line_with("streaming")
        assert len(files_in(core.folder)) == len(files_before) + 1
        program.signal(signal.SIGKILL)
        for _ in range(100_000):
            stats = witness.stats()
            if stats.num_free_blocks == welcome.limits.num_kv_blocks:
                break
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_generation_tokens < 20 * 30_000, "they were aborted, not finished"
        assert in_time(lambda: files_in(core.folder) == files_before)


async def test_a_client_that_leaves_while_the_model_computes_silences_nobody(
    start_core: StartCore,
) -> None:
    core = start_core("step waits")
    staying = AsyncLLMEngine.connect(core.address)
    waiting = asyncio.create_task(complete(staying))
    assert await core.has_reached_gate()
    for _ in range(5):
        leaving = AsyncLLMEngine.connect(core.address)
        stream = await leaving.add_request(None, PROMPT, FOREVER)
        leaving.shutdown()
        assert not stream.completions[0].num_tokens
    core.let_through(1000)
    assert len(await waiting) == 5
    assert await staying.get_stats()
    staying.shutdown()


def test_a_client_that_does_not_read_is_dismissed_and_disturbs_nobody(
    start_core: StartCore,
) -> None:
    core = start_core("one message at a time", max_unread_bytes=10_000)
    with raw_client(core.address) as deaf, raw_client(core.address) as other:
        deaf.join()
        welcome = other.join()
        params = TokenParams(1.0, 1.0, 0, 0.0, 0, 30_000, 0, ())
        for handle in range(20):
            deaf.say(AddRequest(handle, PROMPT, params))
        assert isinstance(refusal := deaf.hear(), Refused)
        assert refusal.kind == "dismissed" and "unread" in refusal.reason
        stats = other.stats()
        assert stats.num_free_blocks == welcome.limits.num_kv_blocks
        assert stats.num_generation_tokens < 20 * 30_000


async def test_clients_with_equal_request_ids_are_isolated(start_core: StartCore) -> None:
    core = start_core()
    async with (
        AsyncLLMEngine.connect(core.address) as first,
        AsyncLLMEngine.connect(core.address) as second,
    ):
        mine = await first.add_request("same", PROMPT, FOREVER)
        yours = await second.add_request("same", PROMPT, FOREVER)
        assert mine.handle == yours.handle
        await anext(mine)
        await first.abort("same")
        seen = (await anext(yours)).outputs[0].token_ids
        while len(seen) < 1000:
            seen = (await anext(yours)).outputs[0].token_ids
        assert not yours.is_finished
        await second.abort("same")


async def test_a_client_may_leave_and_come_back(start_core: StartCore) -> None:
    core = start_core()
    async with AsyncLLMEngine.connect(core.address) as staying:
        stream = await staying.add_request(None, PROMPT, FOREVER)
        engine = AsyncLLMEngine.connect(core.address)
        for _ in range(3):
            await engine.start()
            assert len(await complete(engine)) == 5
            engine.shutdown()
        assert in_time(lambda: len(files_in(core.folder)) == 4), "socket, lock, steps, who stays"
        await anext(stream)
        stream.close()


# ---- frames and versions


def test_garbage_is_counted_and_harms_nobody(start_core: StartCore) -> None:
    core = start_core()
    garbage = [
        (b"",),
        (b"\xc1",),
        (b"\x91" * 100_000,),
        (b"\x92\xa5eject\x90",),
        (b"\x92\xa5abort",),
        (b"", b""),  # counted as two
        (Encoder().encode(GetStats(1)),) * (MAX_FRAMES + 1),
        (os.urandom(1000),),
    ]
    with raw_client(core.address) as bystander, raw_client(core.address) as stranger:
        bystander.join()
        params = TokenParams(1.0, 1.0, 0, 0.0, 0, 5, 0, ())
        for client in (bystander, stranger):
            for frames in garbage:
                client.say(*frames)
        for message in (GetStats(1), AddRequest(1, PROMPT, params)):
            stranger.say(message)  # it has not said hello
        stranger.say(Goodbye())  # no error: it may cross its own disconnection
        stranger.join()
        assert stranger.stats().num_bad_messages == 2 * (len(garbage) + 1) + 2
        stranger.say(b"garbage in front", GetStats(2), b"and behind")  # harms not even its message
        reply = stranger.hear_output()
        assert isinstance(reply, ControlReply) and reply.call == 2
        bystander.say(AddRequest(1, PROMPT, params))
        token_ids: list[int] = []
        while len(token_ids) < 5:
            output = bystander.hear_output()
            assert isinstance(output, StepOutputs)
            token_ids += output.token_ids


def test_a_request_that_cannot_be_decoded_gets_its_end(start_core: StartCore) -> None:
    sound = [1.0, 1.0, 0, 0.0, 0, 5, 0, []]
    unreadable: list[list[Any]] = [
        [7, PROMPT, [-1.0, *sound[1:]]],
        [7, PROMPT, [float("nan"), *sound[1:]]],
        [7, PROMPT, sound, None],
        [7, PROMPT, sound, 0, "", 16_385],
        [7, PROMPT],
        [7],
    ]
    with raw_client(start_core().address) as client:
        client.join()
        client.say(AddRequest(6, PROMPT, TokenParams(0.0, 1.0, 0, 0.0, 0, 30_000, 0, ())))
        for fields in unreadable:
            client.say(msgspec.msgpack.encode(["add", *fields]))
        client.say(msgspec.msgpack.encode(["add", 6]))  # of one that goes on: no end
        client.say(msgspec.msgpack.encode(["add", "7"]))  # of nobody
        ends: list[Finished] = []
        while len(ends) < len(unreadable):
            output = client.hear_output()
            assert isinstance(output, StepOutputs)
            ends += output.finished
        assert {(end.handle, end.kind) for end in ends} == {(7, ErrorKind.INVALID)}
        assert all(end.message for end in ends)
        client.say(AbortRequests([6]))
        ends.clear()
        while not ends:
            output = client.hear_output()
            assert isinstance(output, StepOutputs)
            ends += output.finished
        assert ends == [Finished(6, FinishReason.ABORT)]


def test_a_deadline_beyond_all_clocks_does_not_end_a_core_that_sleeps(
    start_core: StartCore,
) -> None:
    # Held by a grammar, so that the core has nothing to do but wait.
    grammar = Grammar("start: /(a|b){3,900}c/")
    params = TokenParams(0.0, 1.0, 0, 0.0, 0, 3, 0, (), grammar=grammar)
    with raw_client(start_core().address) as client:
        client.join()
        for handle, seconds in enumerate([1e10, 1e308]):
            client.say(AddRequest(handle, PROMPT, params, deadline_s=seconds))
            output = client.hear_output()
            while not (isinstance(output, StepOutputs) and output.finished):
                output = client.hear_output()
            [end] = output.finished
            assert end.handle == handle and end.reason is not FinishReason.ERROR, end


def test_requests_in_one_message_begin_in_one_step(start_core: StartCore) -> None:
    core = start_core()
    params = TokenParams(1.0, 1.0, 0, 0.0, 0, 1, 0, ())
    with raw_client(core.address) as client:
        client.join()
        for number in range(20):
            client.say(*(AddRequest(8 * number + i, PROMPT, params) for i in range(8)))
            output = client.hear_output()
            assert isinstance(output, StepOutputs)
            assert len(output.token_ids) == len(output.finished) == 8


@pytest.mark.parametrize("mode", [None, "load waits"], ids=["serving", "loading"])
def test_another_version_of_the_protocol_is_refused_within_a_second(
    start_core: StartCore, mode: str | None
) -> None:
    core = start_core(mode)
    with raw_client(core.address) as witness, raw_client(core.address) as client:
        witness.say(witness.hello())
        assert isinstance(witness.hear(), Welcome | Progress)
        asked = time.monotonic()
        major, minor = PROTOCOL_VERSION
        client.say(Hello((major + 1, 0), client.endpoint))
        refusal = client.hear()
        assert time.monotonic() - asked < 1
        assert isinstance(refusal, Refused)
        assert refusal.kind == "protocol"
        assert f"{major}.{minor}" in refusal.reason and f"{major + 1}.0" in refusal.reason
        client.say(Hello((major, minor + 1), client.endpoint))
        assert isinstance(client.hear(), Welcome | Progress), "a newer minor version is welcome"


async def test_a_client_of_another_version_gets_an_error_of_its_own(
    start_core: StartCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start_core("load waits")
    monkeypatch.setattr("footplate.frontend.connection.PROTOCOL_VERSION", (2, 0))
    engine = AsyncLLMEngine.connect(core.address)
    error = await error_of(engine.start())
    assert isinstance(error, ProtocolMismatchError)


def test_an_endpoint_that_is_not_the_clients_own_is_refused(start_core: StartCore) -> None:
    core = start_core()
    with raw_client(core.address) as client, raw_client(core.address) as other:
        other.join()
        for endpoint in (other.endpoint, core.address, "ipc:///tmp/elsewhere", "nonsense", ""):
            client.say(Hello(PROTOCOL_VERSION, endpoint))
            assert isinstance(refusal := client.hear(), Refused)
            assert refusal.kind == "hello"
        client.join()


def test_a_client_that_says_hello_twice_is_welcomed_twice_and_known_once(
    start_core: StartCore,
) -> None:
    core = start_core()
    with raw_client(core.address) as client:
        assert client.join() == client.join()
        assert client.stats().num_bad_messages == 0
        assert not client.pull.poll(50), "one answer for one question"


async def test_those_who_come_while_the_model_loads_are_told_how_far_it_is(
    start_core: StartCore,
) -> None:
    core = start_core("load waits")
    heard: list[tuple[str, float]] = []
    half = asyncio.Event()

    def on_progress(phase: str, fraction: float) -> None:
        heard.append((phase, fraction))
        if fraction == 0.5:
            half.set()

    engines = [
        AsyncLLMEngine(address=core.address, start_timeout_s=PATIENCE_S, on_progress=on_progress)
        for _ in range(2)
    ]
    starts = [asyncio.create_task(engine.start()) for engine in engines]
    async with asyncio.timeout(PATIENCE_S):
        await half.wait()
        core.let_through()
        await asyncio.gather(*starts)
    assert ("loading", 0.5) in heard
    for engine in engines:
        assert engine.start_phases["loading"] >= 0
        assert len(await complete(engine)) == 5
        engine.shutdown()


async def test_those_who_wait_for_a_core_that_is_killed_do_not_wait_for_their_deadline(
    start_core: StartCore,
) -> None:
    core = start_core("load waits")
    answered = asyncio.Event()
    engine = AsyncLLMEngine(
        address=core.address, start_timeout_s=600, on_progress=lambda *_: answered.set()
    )
    starting = asyncio.create_task(engine.start())
    async with asyncio.timeout(PATIENCE_S):
        await answered.wait()
    os.kill(core.process.process_id, signal.SIGKILL)
    assert isinstance(await error_of(starting), EngineStartError)


# ---- at rest


def test_an_idle_engine_and_its_client_burn_no_cpu(run: Run, folder: Path) -> None:
    program = run(HERE / "client_program.py", "serving", folder)
    program.line_with("serving")
    processes = [psutil.Process(program.process.pid), *map(psutil.Process, program.children)]

    def used() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    before = used()
    watched_s = 2.0
    assert not in_time(lambda: False, seconds=watched_s)
    for seconds in (after - start for start, after in zip(before, used(), strict=True)):
        assert seconds < 0.1 * watched_s, "somebody polls"
