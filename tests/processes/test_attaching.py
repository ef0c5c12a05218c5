"""Programs that start requests on a launched engine and die, and others that go on with them."""

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from footplate.backend.runner.load import DEMO_MODEL
from footplate.frontend import AsyncLLMEngine, RequestOutputKind, RequestStream, SamplingParams
from footplate.protocol.errors import EngineDeadError, RequestFailedError, RequestLostError
from footplate.protocol.links import default_address
from tests.frontend.fake_model import write_tokenizer

from .client_program import CLIENT_KEY, DETACHABLE, FOREVER, PROMPT, STOPPING
from .conftest import HERE, PATIENCE_S, Program, in_time
from .test_launch import launch, wait_until_ready

Run = Callable[..., Program]
Taken = tuple[list[int], str]


@pytest.fixture
def tokenizer_folder(folder: Path) -> Path:
    place = folder / "tokenizer"
    place.mkdir()
    write_tokenizer(place)
    return place


@pytest.fixture
def launched(run: Run, folder: Path, tokenizer_folder: Path) -> Iterator[Callable[..., str]]:
    """Launch an engine; its address."""

    def start(*flags: str) -> str:
        address = f"ipc://{folder}/engine.sock"
        wait_until_ready(launch(run, address, "--tokenizer", str(tokenizer_folder), *flags))
        return address

    yield start


def known_to(address: str, client_key: str | None = CLIENT_KEY) -> AsyncLLMEngine:
    return AsyncLLMEngine.connect(address, client_key=client_key, timeout_s=PATIENCE_S)


async def rest_of(stream: RequestStream) -> Taken:
    token_ids, text = [], ""
    async with asyncio.timeout(PATIENCE_S):
        async for output in stream:
            token_ids += output.outputs[0].token_ids
            text += output.outputs[0].text
    return token_ids, text


async def whole(address: str) -> Taken:
    """What the request yields when nothing happens."""
    async with known_to(address, None) as engine:
        return await rest_of(await engine.add_request(None, PROMPT, DETACHABLE))


async def is_empty(engine: AsyncLLMEngine) -> bool:
    stats = await engine.get_stats()
    return not (stats.num_running + stats.num_waiting + stats.num_parked + stats.num_detached)


def taken_by(lines: list[str]) -> Taken:
    outputs = [json.loads(line.removeprefix("taken ")) for line in lines]
    return [t for token_ids, _ in outputs for t in token_ids], "".join(text for _, text in outputs)


def kill_one_that_keeps(run: Run, address: str) -> Taken:
    """What a program has handed out of its request before it was killed."""
    program = run(HERE / "client_program.py", "keeping", address)
    program.line_with("waits")
    program.signal(signal.SIGKILL)
    return taken_by(program.seen[:-1])


async def test_another_process_goes_on_where_the_one_that_was_killed_had_come(
    run: Run, launched: Callable[..., str]
) -> None:
    address = launched()
    expected = await whole(address)
    token_ids, text = kill_one_that_keeps(run, address)
    assert 5 <= len(token_ids) < len(expected[0])
    async with known_to(address) as engine:
        stream = await engine.attach("mine", DETACHABLE, from_position=len(token_ids))
        more_ids, more_text = await rest_of(stream)
        assert (token_ids + more_ids, text + more_text) == expected
        # It has ended, and its last words may not have arrived.
        stream = await engine.attach("mine", DETACHABLE)
        assert await rest_of(stream) == expected


async def test_what_a_stop_string_has_ended_is_there_when_its_client_was_killed(
    run: Run, launched: Callable[..., str]
) -> None:
    address = launched("--max-model-len", "1000000")
    program = run(HERE / "client_program.py", "stopping", address)
    program.line_with("stopped")
    program.signal(signal.SIGKILL)
    taken = taken_by(program.seen[:-1])
    assert 4 < len(taken[0]) < 1000 and taken[1]
    async with known_to(address, None) as witness, asyncio.timeout(PATIENCE_S):
        while not (stats := await witness.get_stats()).num_detached:
            pass  # each call waits for its answer
        assert stats.num_running == 0, "the core knows that it has ended"
    async with known_to(address) as engine:
        for from_position in (0, len(taken[0]) - 1, len(taken[0])):
            stream = await engine.attach("mine", STOPPING, from_position=from_position)
            token_ids, text = await rest_of(stream)
            assert token_ids == taken[0][from_position:] and taken[1].endswith(text)
            assert text == taken[1] or from_position
        plain = await engine.attach("mine", DETACHABLE)
        outputs = [output.outputs[0] async for output in plain]
        assert outputs[-1].finish_reason == "stop", "as the core has it, whoever asks"
        assert "sugC" in "".join(output.text for output in outputs)


async def test_what_its_user_has_aborted_is_not_there(launched: Callable[..., str]) -> None:
    async with known_to(launched()) as engine:
        for name, end in (("aborted", engine.abort), ("left", None)):
            stream = await engine.add_request(name, PROMPT, FOREVER, detachable=True)
            await anext(stream)
            if end is None:
                await stream.aclose()
            else:
                await end(name)
            with pytest.raises(RequestLostError, match="it was aborted"):
                await engine.attach(name, FOREVER)
        assert await is_empty(engine)


async def test_the_documented_program_may_be_killed_and_run_again(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    document = (HERE.parent.parent / "docs" / "reliability.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (folder / "story.py").write_text(code)
    launcher = launch(run, default_address(), "--tokenizer", str(DEMO_MODEL))
    wait_until_ready(launcher)
    taken = folder / "taken.jsonl"
    program = run(folder / "story.py")
    assert in_time(lambda: taken.exists() and taken.stat().st_size)
    program.signal(signal.SIGKILL)
    program.status()
    assert run(folder / "story.py").status() == 0
    outputs = [json.loads(line) for line in taken.read_text().splitlines()]
    async with AsyncLLMEngine.connect() as engine:
        params = SamplingParams(max_tokens=2000, seed=7, output_kind=RequestOutputKind.DELTA)
        stream = await engine.add_request(None, "Once upon a time", params)
        token_ids, text = await rest_of(stream)
    assert sum(num_tokens for num_tokens, _ in outputs) == len(token_ids)
    assert "".join(text for _, text in outputs) == text


async def test_whoever_does_not_know_the_key_finds_nothing_and_neither_does_who_comes_too_late(
    run: Run, launched: Callable[..., str]
) -> None:
    address = launched("--lease-s", "0.2")
    kill_one_that_keeps(run, address)
    async with known_to(address, "another client's key") as stranger:
        with pytest.raises(RequestLostError):
            await stranger.attach("mine", DETACHABLE)
        async with asyncio.timeout(PATIENCE_S):
            while not await is_empty(stranger):
                pass  # each call waits for its answer
    async with known_to(address) as engine:
        with pytest.raises(RequestLostError, match="its lease has expired"):
            await engine.attach("mine", DETACHABLE)


async def test_who_leaves_and_detaches_may_come_back_and_who_says_goodbye_has_nothing(
    launched: Callable[..., str],
) -> None:
    address = launched()
    expected = await whole(address)
    engine = known_to(address)
    stream = await engine.add_request("mine", PROMPT, DETACHABLE, detachable=True)
    await anext(await engine.add_request("endless", PROMPT, FOREVER, detachable=True))
    first = (await anext(stream)).outputs[0]
    engine.shutdown(detach=True)
    # The same object starts again, in the place of another process.
    await engine.start()
    with pytest.raises(RequestFailedError, match="in use by a request that goes on"):
        await rest_of(await engine.add_request("endless", PROMPT, FOREVER, detachable=True))
    stream = await engine.attach("mine", DETACHABLE, from_position=len(first.token_ids))
    more_ids, more_text = await rest_of(stream)
    assert (first.token_ids + more_ids, first.text + more_text) == expected
    engine.shutdown()
    async with known_to(address) as engine:
        with pytest.raises(RequestLostError):
            await engine.attach("mine", DETACHABLE)
        assert (await engine.get_stats()).num_detached == 0


async def test_of_two_with_one_key_the_newer_one_stays(launched: Callable[..., str]) -> None:
    address = launched()
    expected = await whole(address)
    async with known_to(address) as old:
        stream = await old.add_request("mine", PROMPT, DETACHABLE, detachable=True)
        await anext(stream)  # otherwise the newer one's greeting may overtake it
        async with known_to(address) as new:
            assert await rest_of(await new.attach("mine", DETACHABLE)) == expected
            with pytest.raises(EngineDeadError, match="same client key"):
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        await old.check_health()
            assert not new.errored and new.engine_restarts == 0
