"""`footplate-engine`: launch an engine core to which any number of clients attach."""

import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, TypeVar

from cyclopts import App, Parameter
from tqdm import tqdm

from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.engine_state import EngineState
from footplate.frontend.health import Restart
from footplate.frontend.link_keys import new_owner_keys
from footplate.frontend.session import Session
from footplate.frontend.supervisor import Supervisor
from footplate.protocol.bounds import require_number
from footplate.protocol.errors import (
    AddressInUseError,
    EngineError,
    EngineStartError,
    InvalidParameterError,
)
from footplate.protocol.links import default_address, ipc_path, make_owned_dir
from footplate.protocol.messages import GetStats, Welcome

# After sysexits.h.
EX_USAGE = 2
EX_SOFTWARE = 70
EX_CONFIG = 78

# Nobody waits for this pulse, and each beat wakes an idle core.
BEAT_S = 1.0
SILENT_S = 3.0
AT_ONCE_S = 1.0
# Within which clients have come to a core that has just taken another's place, and said what they
# want of it. One that is drained before has nothing to finish.
REATTACH_S = 1.0

T = TypeVar("T")

app = App(name="footplate-engine", version=lambda: version("footplate-llm"))


@app.default
def launch(
    args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(log_level="INFO"),  # noqa: B008
    *,
    address: str | None = None,
    drain_timeout_s: float = 30.0,
) -> int:
    """Launch an engine core and keep it running until SIGTERM or SIGINT.

    Clients attach with `AsyncLLMEngine.connect(address)`, leave, and come back. A core that dies or
    hangs is replaced, and their requests go on. A signal lets requests finish first, a second one
    does not. Exit status: 0 after a signal, 2 for wrong arguments, 70 when the core cannot be
    replaced any more, 78 when it cannot start or the address is in use.

    Parameters
    ----------
    address:
        Where clients find it: ipc:///absolute/path or, with --key-dir, tcp://host:port. If not
        given, footplate/engine.sock in $XDG_RUNTIME_DIR, else /tmp/footplate-UID/engine.sock,
        where clients look by default.
    drain_timeout_s:
        How long requests may take to finish after the first signal; those that are left end with
        finish reason "abort".
    """
    require_number("drain_timeout_s", drain_timeout_s, 0.0, math.inf)
    return asyncio.run(_Launcher(args, address or default_address(), drain_timeout_s).run())


class _Launcher:
    """Owns the engine for as long as it runs."""

    def __init__(self, args: EngineArgs, address: str, drain_timeout_s: float) -> None:
        self._address = address
        self._drain_timeout_s = drain_timeout_s
        self._bar = _ProgressBar()
        keys = None if args.key_dir is None else new_owner_keys(args.key_dir)
        self._supervisor = Supervisor(args, address, "" if keys is None else keys.public_key)
        self._session = Session(
            EngineClient(),
            self._supervisor,
            None,
            args.start_timeout_s,
            keys=keys,
            patience=replace(args.patience, beat_s=BEAT_S, silent_s=SILENT_S),
            # Whoever waits for the core is in another process.
            is_always_watching=True,
            on_progress=self._bar.show,
            on_restart=_print_restart,
        )
        self._num_signals = 0
        self._signalled = asyncio.Event()

    async def run(self) -> int:
        """Start, serve, drain, stop; return the exit status."""
        since = time.monotonic()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)
        if path := ipc_path(self._address):
            make_owned_dir(path.parent)
        error: EngineError | None = None
        try:
            with self._bar:
                await self._until_signal(self._session.start())
            if not self._num_signals:
                _print_ready(self._session.welcome, self._address, time.monotonic() - since)
                error = await self._until_signal(self._session.wait_until_dead())
            if self._session.state in (EngineState.SERVING, EngineState.RESTARTING):
                await self._drain()
        except EngineError as failure:
            error = failure
        finally:
            await self._until_signal(self._supervisor.end())
            self._session.stop()
        if error is None:
            return 0
        print(f"footplate-engine: {error}", file=sys.stderr)
        return EX_CONFIG if isinstance(error, AddressInUseError) else EX_SOFTWARE

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._signalled.set()

    async def _until_signal(self, waiting: Coroutine[object, object, T]) -> T | None:
        """What is waited for; None if a signal comes before."""
        self._signalled.clear()
        task = asyncio.ensure_future(waiting)
        signalled = asyncio.ensure_future(self._signalled.wait())
        try:
            await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for each in (task, signalled):
                each.cancel()

    async def _drain(self) -> None:
        """Let requests finish, for a while; a second signal ends them at once."""
        deadline = time.monotonic() + self._drain_timeout_s
        while self._num_signals == 1:
            serves, num_restarts = (
                self._session.state is EngineState.SERVING,
                self._session.num_restarts,
            )
            await self._print_num_left()
            if self._num_signals == 1:
                left_s = max(0.0, deadline - time.monotonic())
                await self._until_signal(self._session.drain(left_s))
            if serves and self._session.num_restarts == num_restarts:
                break
            # Another core has taken over meanwhile: what clients had in the one before comes back
            # with them, and is to finish as well.
            await self._until_signal(asyncio.sleep(REATTACH_S))
        if self._num_signals > 1:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(AT_ONCE_S):
                    await self._session.drain(0.0)

    async def _print_num_left(self) -> None:
        reply = await self._until_signal(self._session.call(GetStats))
        stats = None if reply is None else reply.stats
        if stats is not None and (num_left := stats.num_running + stats.num_waiting):
            print(
                f"footplate-engine: {num_left} requests are left; waiting for them for at most "
                f"{self._drain_timeout_s:g} s (a second signal ends them)",
                file=sys.stderr,
            )


class _ProgressBar:
    """A bar on a terminal, a line per phase elsewhere."""

    def __init__(self) -> None:
        self._bar = tqdm(total=100, bar_format="{desc}: {percentage:3.0f} %", disable=None)
        self._phase = ""

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.leave = False
        self._bar.close()

    def show(self, phase: str, fraction: float) -> None:
        """Show how far start-up is."""
        if self._bar.disable and phase != self._phase:
            print(f"footplate-engine: {phase}", file=sys.stderr)
        self._phase = phase
        self._bar.set_description_str(phase, refresh=False)
        self._bar.n = round(100 * fraction)
        self._bar.refresh()


def _print_restart(restart: Restart) -> None:
    print(
        f"footplate-engine: core replaced in {restart.seconds:.2f} s, restart "
        f"{restart.num_restarts}: {restart.cause}",
        file=sys.stderr,
        flush=True,
    )


def _print_ready(welcome: Welcome, address: str, seconds: float) -> None:
    model, limits = welcome.model, welcome.limits
    slowest = sorted(welcome.phases.items(), key=lambda phase: -phase[1])[:3]
    phases = ", ".join(f"{name} {took:.2f} s" for name, took in slowest)
    print(
        f"footplate-engine: {model.model} ({model.architecture}, {model.dtype}, {model.device}) "
        f"ready in {seconds:.2f} s on {address}: core process {welcome.process_id}, "
        f"{limits.num_kv_blocks} KV blocks of {limits.block_size}, max_model_len "
        f"{model.max_model_len} ({phases})",
        file=sys.stderr,
        flush=True,
    )


def main() -> int:
    """The console script."""
    try:
        return int(app() or 0)
    except InvalidParameterError as error:
        print(f"footplate-engine: {error}", file=sys.stderr)
        return EX_USAGE
    except EngineStartError as error:  # a folder that is not ours; nothing was started
        print(f"footplate-engine: {error}", file=sys.stderr)
        return EX_CONFIG


if __name__ == "__main__":
    sys.exit(main())
