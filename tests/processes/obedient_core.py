"""An engine core whose model does what a test says. A program: it stands in for
`python -m footplate.backend`, and everything around the model runner is the real thing."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from footplate.backend import core_process, inbox, outbox
from footplate.backend.__main__ import main
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.step import StepPlan, StepResult
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig


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


def obey(mode: str, gate: str) -> None:
    """Prepare what `mode` names, before the core starts."""

    def load(
        model: ModelConfig,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        on_progress: Callable[[str, float], None],
        processors: Sequence[type[LogitsProcessor]] = (),
    ) -> ObedientRunner:
        runner = ObedientRunner(model, cache, DEMO_MODEL, processors)
        match mode:
            case "step raises":
                runner.before_step = fail
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
            case "load raises":
                print("what a library prints", flush=True)
                os.write(1, b"or writes")
                raise ValueError("no weights\n  in the folder")
        return runner

    core_process.load_runner = load  # type: ignore[attr-defined]
    if mode == "small budget":
        inbox.SEND_HIGH_WATER_MARK = 1
        outbox.MAX_BACKLOG_BYTES = 10_000


if __name__ == "__main__":
    obey(*sys.argv[1:3])
    status = main()
    sys.stderr.flush()
    os._exit(status)
