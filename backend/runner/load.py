"""From a model's name to what makes its runner. Imports torch only for models that need it."""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from footplate.backend.kernels import build
from footplate.backend.kernels.touched_memory import TouchedMemory
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.runner.cache_size import MAX_DEFAULT_HOST_BYTES
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.step import MakeRunner, ModelRunner, OnProgress
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.errors import EngineStartError

DEMO_MODEL = Path(__file__).parent.parent / "models" / "demo"


def import_ahead(model: ModelConfig) -> None:
    """Import what `prepare_runner` will need, and compile the kernels, once in a process. Quietly:
    `prepare_runner` says what is wrong. Leaves no thread behind."""
    if model.model == "fake" or "torch" in sys.modules:
        return
    # On the very first start the compiler takes longer than these imports, on a core of its own.
    ahead = (build.cache_folder(os.environ),)
    compiling = threading.Thread(target=build.compile_ahead, args=ahead, daemon=True)
    compiling.start()
    with suppress(Exception):
        from footplate.backend.runner.checkpoint import find_folder, import_architecture
        from footplate.backend.runner.model_runner import prepare_model_runner  # noqa: F401

        import_architecture(find_folder(model.model))
    compiling.join()


def prepare_runner(
    model: ModelConfig,
    cache: CacheConfig,
    on_progress: OnProgress,
    processors: Sequence[type[LogitsProcessor]] = (),
    *,
    is_standby: bool = False,
    weights_file: int | None = None,
) -> MakeRunner:
    """Load what `model.model` names: "fake", "demo", a folder, or a cached hub model.

    Args:
        cache: of which a standby uses the block size.
        on_progress: told of each phase as it begins.
        processors: custom logits processors that requests may use.
        is_standby: nobody knows when the runner will be made: take no memory for a KV cache, and
            none of a GPU.
        weights_file: see `CoreConfig`.

    Returns:
        What makes the runner, once, when it is to serve.

    Raises:
        EngineStartError: a real model was asked for, and torch or transformers is missing.
        Exception: whatever makes loading fail, with a message for the user.
    """
    if model.model == "fake":
        return lambda cache, scheduler, on_progress: FakeModelRunner(
            model, cache, DEMO_MODEL, processors
        )
    on_progress("importing torch", 0.0)
    touched = (
        None if is_standby else TouchedMemory(cache.kv_cache_memory_bytes or MAX_DEFAULT_HOST_BYTES)
    )
    import_ahead(model)
    try:
        from footplate.backend.runner.model_runner import prepare_model_runner
    except ModuleNotFoundError as error:
        raise EngineStartError(
            f"model {model.model!r} needs the package {error.name!r}: "
            "pip install 'footplate-llm[engine]'"
        ) from None
    prepared = prepare_model_runner(
        model,
        cache.block_size,
        on_progress,
        touched,
        processors,
        is_standby=is_standby,
        weights_file=weights_file,
    )

    def make(
        cache: CacheConfig, scheduler: SchedulerConfig, on_progress: OnProgress
    ) -> ModelRunner:
        try:
            return prepared(cache, scheduler, on_progress)
        finally:
            if touched is not None:
                touched.close()

    return make
