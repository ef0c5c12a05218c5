"""`footplate-engine`: launch an engine core to which any number of clients attach."""

import asyncio
import contextlib
import signal
import sys
import time
from importlib.metadata import version
from typing import Annotated

from cyclopts import App, Parameter
from tqdm import tqdm

from footplate.frontend.connection import Connection
from footplate.frontend.core_process import CoreProcess
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.link_keys import new_owner_keys
from footplate.protocol.errors import AddressInUseError, EngineStartError, InvalidParameterError
from footplate.protocol.links import default_address, ipc_path, make_owned_dir
from footplate.protocol.messages import Progress, Welcome

# After sysexits.h.
EX_USAGE = 2
EX_SOFTWARE = 70
EX_CONFIG = 78

app = App(name="footplate-engine", version=lambda: version("footplate-llm"))


@app.default
def launch(
    args: Annotated[EngineArgs, Parameter(name="*")] = EngineArgs(log_level="INFO"),  # noqa: B008
    *,
    address: str | None = None,
) -> int:
    """Launch an engine core and keep it running until SIGTERM or SIGINT.

    Clients attach with `AsyncLLMEngine.connect(address)`, leave, and come back.

    Parameters
    ----------
    address:
        Where clients find it: ipc:///absolute/path or, with --key-dir, tcp://host:port. If not
        given, footplate/engine.sock in $XDG_RUNTIME_DIR, else /tmp/footplate-UID/engine.sock,
        where clients look by default.
    """
    return asyncio.run(_Launcher(args, address or default_address()).run())


class _Launcher:
    """Owns the core process for as long as it runs."""

    def __init__(self, args: EngineArgs, address: str) -> None:
        self._args = args
        self._address = address
        self._keys = None if args.key_dir is None else new_owner_keys(args.key_dir)
        self._stop = asyncio.Event()
        self._core_error: EngineStartError | None = None

    async def run(self) -> int:
        """Start, serve, stop; return the exit status."""
        since = time.monotonic()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        if path := ipc_path(self._address):
            make_owned_dir(path.parent)
        process = CoreProcess(
            self._args.core_config(
                self._address, owner_key="" if self._keys is None else self._keys.public_key
            ),
            lambda error: loop.call_soon_threadsafe(self._on_core_exit, error),
        )
        try:
            welcome = await self._wait_until_ready()
            # Another core on this address may have answered; then ours is about to fail.
            if welcome is not None and welcome.process_id == process.process_id:
                _print_ready(welcome, self._address, time.monotonic() - since)
            await self._stop.wait()
        except EngineStartError as error:
            self._core_error = self._core_error or error
        finally:
            await asyncio.to_thread(process.stop)
        if self._core_error is None:
            return 0
        print(f"footplate-engine: {self._core_error}", file=sys.stderr)
        return EX_CONFIG if isinstance(self._core_error, AddressInUseError) else EX_SOFTWARE

    def _on_core_exit(self, error: EngineStartError) -> None:
        self._core_error = error
        self._stop.set()

    async def _wait_until_ready(self) -> Welcome | None:
        """Attach as any client does, until the core is ready; None if told to stop before."""
        with _ProgressBar() as bar:
            connection = Connection(
                self._address,
                on_messages=lambda messages: None,
                on_lost=lambda cause: None,
                on_progress=bar.show,
                keys=self._keys,
            )
            opening = asyncio.create_task(connection.open(self._args.start_timeout_s))
            stopped = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait((opening, stopped), return_when=asyncio.FIRST_COMPLETED)
                return await opening if opening.done() else None
            finally:
                stopped.cancel()
                opening.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineStartError):
                    await opening
                connection.close()


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

    def show(self, progress: Progress) -> None:
        """Show how far start-up is."""
        if self._bar.disable and progress.phase != self._phase:
            print(f"footplate-engine: {progress.phase}", file=sys.stderr)
        self._phase = progress.phase
        self._bar.set_description_str(progress.phase, refresh=False)
        self._bar.n = round(100 * progress.fraction)
        self._bar.refresh()


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
