"""An engine core whose model does what a test says. A program: it stands in for the fork server,
and everything around the model runner is the real thing."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from footplate.backend import core_process, inbox
from footplate.backend.fork_server import main
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.step import MakeRunner, OnProgress, StepPlan, StepResult
from footplate.protocol.config import CacheConfig, ModelConfig
from footplate.protocol.errors import EngineStartError


class Gate:
    """A FIFO into which the test puts one byte for everyone it lets through, and a file that
    says that somebody waits."""

    def __init__(self, path: str) -> None:
        self._fifo = os.open(path, os.O_RDONLY)
        self._reached = Path(f"{path}.reached")

    def wait(self) -> None:
        self._reached.touch()
        os.read(self._fifo, 1)


class ObedientRunner(FakeModelRunner):
    """Calls `before_step` before every step that computes something."""

    before_step: Callable[[], None] = staticmethod(lambda: None)

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.requests:
            self.before_step()
        return super().execute(plan)


class AcceleratorError(RuntimeError):
    """By its name, the device is lost: there is nobody else to try the step with."""


def fail() -> None:
    raise AcceleratorError("the step failed\n  for a reason")


def fail_with_a_file() -> None:
    raise RuntimeError("cannot map /home/operator/weights at 0x7f001122")


def obey(mode: str, gate: str) -> None:
    """Prepare what `mode` names, before the core starts."""

    def prepare(
        model: ModelConfig,
        cache: CacheConfig,
        on_progress: OnProgress,
        processors: Sequence[type[LogitsProcessor]] = (),
        **options: object,
    ) -> MakeRunner:
        runner = ObedientRunner(model, cache, DEMO_MODEL, processors)
        match mode:
            case "step raises":
                runner.before_step = fail
            case "step raises and names a file":
                runner.before_step = fail_with_a_file
            case "step waits":
                runner.before_step = Gate(gate).wait
            case "step waits and raises":
                gatekeeper = Gate(gate)

                def wait_and_fail() -> None:
                    gatekeeper.wait()
                    fail()

                runner.before_step = wait_and_fail
            case "load waits":
                on_progress("loading", 0.25)
                on_progress("loading", 0.5)
                Gate(gate).wait()
            case "load refuses":
                raise EngineStartError("the weights are damaged")
            case "load raises":
                print("what a library prints", flush=True)
                os.write(1, b"or writes")
                raise ValueError("no weights\n  in the folder")
        return lambda cache, scheduler, on_progress: runner

    core_process.prepare_runner = prepare  # type: ignore[attr-defined]
    if mode == "one message at a time":
        inbox.SEND_HIGH_WATER_MARK = 1


if __name__ == "__main__":
    obey(*sys.argv[1:3])
    main()
