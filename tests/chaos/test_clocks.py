"""Clocks that jump, and machines that sleep (F38, F39)."""

import ast
import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .conftest import PATIENCE_S, Ledger, all_exact

ROOT = Path(__file__).parents[2]
MAY_TELL_THE_TIME = {
    # When a request came, as its owner's clock had it: compared with that clock at once, and told.
    "frontend/request_schedule.py",
    "frontend/text/template_sandbox.py",  # today's date, for chat templates that mention it
}
WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today"}


def wall_clock_calls(path: Path) -> list[int]:
    """Lines in which a file asks for the time of day."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if name in ("time", "datetime", "date") and node.func.attr in WALL_CLOCKS:
                lines.append(node.lineno)
    return lines


def test_nothing_is_measured_with_a_clock_that_may_be_set() -> None:
    files = [
        path
        for layer in ("protocol", "frontend", "backend")
        for path in (ROOT / layer).rglob("*.py")
    ]
    telling = {str(path.relative_to(ROOT)) for path in files if wall_clock_calls(path)}
    assert telling - {name for name in telling if name.startswith("frontend/benchmark/")} <= (
        MAY_TELL_THE_TIME
    )
    assert len(files) > 100


@pytest.mark.parametrize(
    "jump_s", [-3600.0, pytest.param(3600.0, marks=pytest.mark.chaos)], ids=["back", "ahead"]
)
async def test_an_hour_more_or_less_changes_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    true_time = time.time
    async with ledger.engine("runner.execute:sleep=0.002") as engine:
        streams = asyncio.create_task(all_exact(engine, 16))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(time, "time", lambda: true_time() + jump_s)
        await all_exact(engine, 16)
        await streams
        assert (await engine.health()).is_ready
    assert not ledger.restarts


SLEEPER = """
import asyncio
from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams

async def main():
    args = EngineArgs(model="fake", stall_timeout_s=0.4, hang_timeout_s=0.8, log_level="ERROR")
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        params = SamplingParams(max_tokens=1500, detokenize=False)
        stream = await engine.add_request(None, [20], params)
        await anext(stream)
        print("streaming", flush=True)
        outputs = [output async for output in stream]
        print(len(outputs[-1].outputs[0].token_ids), engine.engine_restarts, flush=True)

asyncio.run(main())
"""


@pytest.mark.chaos
def test_a_machine_that_slept_wakes_up_to_an_engine_that_works(ledger: Ledger) -> None:
    """All processes stop for longer than what would count as hung, and go on."""
    ledger.fail("runner.execute:sleep=0.001")
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        for member in family:
            member.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        for member in family:
            member.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=PATIENCE_S)[0] == "1500 0\n"
    finally:
        process.kill()
        process.wait()
