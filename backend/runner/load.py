"""From a model's name to a model runner. Imports torch only for models that need it."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from footplate.backend.kernels import build
from footplate.backend.kernels.touched_memory import TouchedMemory
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.runner.cache_size import MAX_DEFAULT_HOST_BYTES
from footplate.backend.runner.fake import FakeModelRunner
from footplate.backend.step import ModelRunner
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.errors import EngineStartError

DEMO_MODEL = Path(__file__).parent.parent / "models" / "demo"


def load_runner(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    on_progress: Callable[[str, float], None],
    processors: Sequence[type[LogitsProcessor]] = (),
) -> ModelRunner:
    """Load what `model.model` names: "fake", "demo", a folder, or a cached hub model.

    Args:
        on_progress: told of each phase as it begins.
        processors: custom logits processors that requests may use.

    Raises:
        EngineStartError: a real model was asked for, and torch or transformers is missing.
        Exception: whatever makes loading fail, with a message for the user.
    """
    if model.model == "fake":
        return FakeModelRunner(model, cache, DEMO_MODEL, processors)
    on_progress("importing torch", 0.0)
    # On the very first start the compiler takes longer than these imports, on a core of its own.
    ahead = (build.cache_folder(os.environ),)
    threading.Thread(target=build.compile_ahead, args=ahead, daemon=True).start()
    touched = TouchedMemory(cache.kv_cache_memory_bytes or MAX_DEFAULT_HOST_BYTES)
    try:
        from footplate.backend.runner.model_runner import load_model_runner
    except ModuleNotFoundError as error:
        touched.close()
        raise EngineStartError(
            f"model {model.model!r} needs the package {error.name!r}: "
            "pip install 'footplate-llm[engine]'"
        ) from None
    try:
        return load_model_runner(model, cache, scheduler, on_progress, touched, processors)
    finally:
        touched.close()
