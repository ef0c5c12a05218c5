"""An application with an engine, to be killed. A program: its argument is what it does."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from footplate.frontend import (
    LLM,
    AsyncLLMEngine,
    EngineArgs,
    RequestOutputKind,
    SamplingParams,
    supervisor,
)
from footplate.protocol.errors import EngineClosedError

forgotten: LLM
FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)
CLIENT_KEY = "what only this program knows"
PROMPT = [20, 21]
DETACHABLE = SamplingParams(max_tokens=5_000, seed=3, output_kind=RequestOutputKind.DELTA)
# The fake model comes to this in the first hundred tokens; without it, it would go on for long.
STOPPING = SamplingParams(
    max_tokens=900_000, seed=3, output_kind=RequestOutputKind.DELTA, stop=["sugC"]
)


def say(*words: object) -> None:
    # One write: two processes may be speaking.
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


async def stream(engine: AsyncLLMEngine) -> None:
    """Twenty requests that do not end; says so when all of them have begun."""
    streams = [await engine.add_request(str(n), [20 + n], FOREVER) for n in range(20)]
    for request in streams:
        await anext(request)
    say("streaming")


async def own_engine(until: str) -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake"))
    engine.start_background_loop()
    await asyncio.sleep(0)
    say("starting")
    if until != "starting":
        await engine.start()
        say("serving")
    if until == "streaming":
        await stream(engine)
    await asyncio.Event().wait()


async def attached(address: str) -> None:
    engine = AsyncLLMEngine.connect(address)
    await engine.start()
    say("serving")
    await stream(engine)
    await asyncio.Event().wait()


async def keeping(address: str) -> None:
    """A request that goes on without us; what has been handed out of it, and then reads no more."""
    engine = AsyncLLMEngine.connect(address, client_key=CLIENT_KEY)
    stream = await engine.add_request("mine", PROMPT, DETACHABLE, detachable=True)
    for _ in range(5):
        [completion] = (await anext(stream)).outputs
        say("taken", json.dumps([completion.token_ids, completion.text]))
    say("waits")
    await asyncio.Event().wait()


async def stopping(address: str) -> None:
    """A request that a stop string ends; what has been handed out of it."""
    engine = AsyncLLMEngine.connect(address, client_key=CLIENT_KEY)
    stream = await engine.add_request("mine", PROMPT, STOPPING, detachable=True)
    async for output in stream:
        [completion] = output.outputs
        say("taken", json.dumps([completion.token_ids, completion.text]))
    await engine.get_stats()  # the core has heard all that was said before
    say("stopped")
    await asyncio.Event().wait()


def report(call: Callable[[], object]) -> None:
    """Fork, and say what comes of a call in the child and then in the parent."""
    child = os.fork()
    try:
        call()
    except EngineClosedError as error:
        say("child" if not child else "parent", "refused:", error)
    else:
        say("child" if not child else "parent", "served")
    if child:
        os.waitpid(child, 0)
        call()
        say("parent served after its child's end")


def fork_an_engine() -> None:
    engine = AsyncLLMEngine(EngineArgs(model="fake"))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        parent = os.getpid()

        def ask() -> object:
            if os.getpid() == parent:
                return runner.run(engine.get_stats())
            return asyncio.run(engine.get_stats())

        report(ask)
        if os.getpid() != parent:
            os._exit(0)  # the loop is the parent's


def fork_an_llm() -> None:
    llm = LLM(model="fake")
    report(llm.get_stats)


def main(what: str, where: str) -> None:
    """`where` is the address to attach to, or the folder for private folders."""

    def make_private_dir() -> Path:
        return Path(tempfile.mkdtemp(dir=where))

    supervisor.make_private_dir = make_private_dir  # type: ignore[attr-defined]
    match what:
        case "attached":
            asyncio.run(attached(where))
        case "keeping":
            asyncio.run(keeping(where))
        case "stopping":
            asyncio.run(stopping(where))
        case "forgets":  # an engine that is not shut down at the end of the program
            engine = AsyncLLMEngine(EngineArgs(model="fake"))
            asyncio.run(stream(engine))
        case "forgets an LLM":
            global forgotten
            forgotten = LLM(model="fake")
            forgotten.generate([20], SamplingParams(detokenize=False), use_tqdm=False)
            say("streaming")
        case "forks":
            fork_an_engine()
        case "forks an LLM":
            fork_an_llm()
        case _:
            asyncio.run(own_engine(what))


if __name__ == "__main__":
    main(*sys.argv[1:])
