"""Loading a model: weights, the choice between paged and per-request attention, the KV cache."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels
from footplate.backend.kernels.touched_memory import TouchedMemory
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.wanted import max_scored_rows
from footplate.backend.runner import cuda_memory
from footplate.backend.runner.attention_backend import AttentionBackend, LayerShape
from footplate.backend.runner.cache_size import CacheSize, default_host_bytes, size_cache
from footplate.backend.runner.checkpoint import check_files, find_folder, load_config, load_model
from footplate.backend.runner.cpu_attention import CpuAttention
from footplate.backend.runner.errors import ModelLoadError
from footplate.backend.runner.limits import attention_windows, eos_token_ids, length_limits
from footplate.backend.runner.mapped_weights import MappedWeights
from footplate.backend.runner.onednn_linear import pack_linears
from footplate.backend.runner.paged_model import Forward, PagedModel
from footplate.backend.runner.paged_runner import PagedRunner
from footplate.backend.runner.per_request_runner import (
    CachedModel,
    CacheError,
    PerRequestRunner,
    probe_chunks,
)
from footplate.backend.runner.probe import NotPagedError, probe_paged, tolerance_of
from footplate.backend.runner.rewrite import rewrite_model
from footplate.backend.runner.sampler import Sampler
from footplate.backend.runner.thread_governor import ThreadGovernor
from footplate.backend.runner.torch_attention import TorchAttention
from footplate.backend.runner.warm_up import warm_up
from footplate.backend.step import ModelRunner, RunnerFacts
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import ModelFacts

logger = logging.getLogger(__name__)

# Weights that one core reads in about a millisecond.
SMALL_MODEL_BYTES = 32 * 2**20


def load_model_runner(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    on_progress: Callable[[str, float], None],
    touched: TouchedMemory | None = None,
    processors: Sequence[type[LogitsProcessor]] = (),
) -> ModelRunner:
    """Load a model and everything it needs to run, ready for its first step.

    Args:
        on_progress: told of each phase as it begins.
        touched: for a KV cache on the CPU.
        processors: custom logits processors that requests may use.

    Raises:
        ModelLoadError: see `ModelLoadError`.
    """
    device = _choose_device(model.device)
    on_progress("loading weights", 0.0)
    folder = find_folder(model.model)
    check_files(folder)
    config = load_config(folder)
    limits = length_limits(config)
    if model.max_model_len is not None and model.max_model_len > limits.hard:
        raise ModelLoadError(
            f"max_model_len={model.max_model_len}: the model's limit is {limits.hard} tokens"
        )
    wanted_len = model.max_model_len or limits.paged
    network = load_model(folder, config, model, device)
    torch.set_num_threads(model.num_threads or _default_num_threads(network))
    num_parameters = sum(p.numel() for p in network.parameters())
    loaded = _Loaded(model, folder, network, num_parameters, wanted_len, cache, scheduler)
    on_progress("checking attention", 0.0)
    own_kernels = _load_kernels(network, cache.block_size)
    mapped = MappedWeights(folder)
    if model.quantization and own_kernels is None:
        raise ModelLoadError(
            f"quantization={model.quantization!r} needs the CPU kernels, and there are none: they "
            "want device='cpu', a C++ compiler, float32 or bfloat16, and a block_size that is a "
            f"multiple of 16 (here {network.device.type}, {network.dtype}, {cache.block_size})"
        )
    sampler = Sampler(own_kernels, processors)
    try:
        if wanted_len > limits.paged:
            raise NotPagedError(f"beyond {limits.paged} tokens its positions are encoded anew")
        backend: AttentionBackend[Any, Any] = TorchAttention(device, cache.block_size)
        if own_kernels is not None:
            backend = CpuAttention(own_kernels, cache.block_size)
        windows = attention_windows(config, wanted_len)
        # Quantised, a model takes half its memory and less. It should not need all of it to start.
        saves_memory = mapped.released_after_use if model.quantization else nullcontext
        with saves_memory(network):
            shapes = probe_paged(network, backend, cache.block_size, windows)
    except NotPagedError as reason:
        if model.quantization:
            raise ModelLoadError(
                f"quantization={model.quantization!r} is for models with paged attention; "
                f"{type(network).__name__} has it not: {reason}"
            ) from None
        logger.warning(
            "%s gets a forward and a cache per request, not paged attention: %s",
            type(network).__name__,
            reason,
        )
        _pack_for_torch(network, mapped, on_progress)
        runner = _per_request_runner(loaded, sampler, wanted_len <= limits.paged, on_progress)
    else:
        direct = None
        if own_kernels is None:
            _pack_for_torch(network, mapped, on_progress)
        else:
            on_progress("packing weights", 0.0)
            direct = rewrite_model(
                network,
                own_kernels,
                backend,
                shapes,
                block_size=cache.block_size,
                max_model_len=wanted_len,
                mapped=mapped,
                quantization=model.quantization,
            )
            backend = CpuAttention(own_kernels, cache.block_size, touched)
        runner = _paged_runner(loaded, backend, shapes, direct, sampler, on_progress)
    on_progress("warming up", 0.0)
    warm_up(runner)
    return runner


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model with its weights, and what it was asked for with."""

    requested: ModelConfig
    folder: Path
    network: Any
    num_parameters: int
    wanted_len: int
    cache: CacheConfig
    scheduler: SchedulerConfig

    def size_cache(self, bytes_per_block: int, budget_bytes: int) -> CacheSize:
        return size_cache(
            self.cache,
            self.scheduler,
            bytes_per_block=bytes_per_block,
            budget_bytes=budget_bytes,
            wanted_len=self.wanted_len,
            len_is_given=self.requested.max_model_len is not None,
        )

    def facts(self, size: CacheSize, attention: str, supports_prefix_caching: bool) -> RunnerFacts:
        network = self.network
        vocab_size = network.config.get_text_config(decoder=True).vocab_size
        return RunnerFacts(
            model=ModelFacts(
                model=self.requested.model,
                tokenizer=self.requested.tokenizer or str(self.folder),
                architecture=type(network).__name__,
                vocab_size=vocab_size,
                max_model_len=size.max_model_len,
                eos_token_ids=eos_token_ids(network),
                dtype=str(network.dtype).removeprefix("torch."),
                device=str(network.device),
                attention=attention,
                num_parameters=self.num_parameters,
                quantization=self.requested.quantization,
            ),
            num_kv_blocks=size.num_blocks,
            supports_prefix_caching=supports_prefix_caching,
            max_scored_rows=max_scored_rows(vocab_size),
        )


def _default_num_threads(network: Any) -> int:
    """All cores of the CPU set; one for a model that is too small to share out.

    Threads that wait for each other spin. Where another process wants the cores, too, each of a
    small model's operations then takes as long as a scheduler's time slice: 240 ms per step
    instead of 2 for the demo model on two busy cores, and nothing to gain on idle ones.
    """
    weight_bytes = sum(p.nbytes for p in network.parameters())
    return 1 if weight_bytes < SMALL_MODEL_BYTES else len(os.sched_getaffinity(0))


def _choose_device(requested: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise ModelLoadError("device='cuda': torch finds no usable GPU")
    return torch.device("cuda", 0) if has_cuda and requested != "cpu" else torch.device("cpu")


def _load_kernels(network: Any, block_size: int) -> Kernels | None:
    """Our own kernels, where they exist: on CPUs with a compiler, for their types and pages."""
    fits = network.dtype in (torch.float32, torch.bfloat16) and CpuAttention.supports(block_size)
    if network.device.type != "cpu" or not fits:
        return None
    library = build.load(build.cache_folder(os.environ))
    return None if library is None else Kernels(library)


def _pack_for_torch(
    network: Any, mapped: MappedWeights, on_progress: Callable[[str, float], None]
) -> None:
    if network.device.type == "cpu":
        on_progress("packing weights", 0.0)
        pack_linears(network, mapped)


def _paged_runner(
    loaded: _Loaded,
    backend: AttentionBackend[Any, Any],
    shapes: Mapping[int, LayerShape],
    direct: Forward | None,
    sampler: Sampler,
    on_progress: Callable[[str, float], None],
) -> ModelRunner:
    on_progress("allocating KV cache", 0.0)
    cache, network = loaded.cache, loaded.network
    bytes_per_block = sum(backend.bytes_per_block(shape) for shape in shapes.values())
    size = loaded.size_cache(bytes_per_block, _budget_bytes(loaded, backend, shapes))
    paged = PagedModel(network, backend, size.num_blocks, shapes, direct)
    facts = loaded.facts(size, f"paged {backend.name}", supports_prefix_caching=True)
    # Only where the number of threads changes no result, and nobody has asked for a number.
    free_to_choose = isinstance(backend, CpuAttention) and loaded.requested.num_threads is None
    governor = (
        ThreadGovernor(
            torch.get_num_threads(), torch.set_num_threads, time.monotonic, time.process_time
        )
        if free_to_choose
        else None
    )
    return PagedRunner(paged, facts, cache.block_size, sampler, governor)


def _budget_bytes(
    loaded: _Loaded, backend: AttentionBackend[Any, Any], shapes: Mapping[int, LayerShape]
) -> int:
    """What the KV cache may take when nobody says how much, in bytes."""
    device, cache = loaded.network.device, loaded.cache
    if device.type == "cpu":
        return default_host_bytes()
    if cache.num_gpu_blocks_override is not None or cache.kv_cache_memory_bytes is not None:
        return 0  # the user has said it; a profiling step would only cost time
    step_bytes = cuda_memory.largest_step_bytes(
        loaded.network,
        backend,
        shapes,
        block_size=cache.block_size,
        num_tokens=loaded.scheduler.max_num_batched_tokens,
        num_seqs=loaded.scheduler.max_num_seqs,
        max_model_len=loaded.wanted_len,
    )
    return max(0, cuda_memory.free_bytes(device, cache.gpu_memory_utilization) - step_bytes)


def _per_request_runner(
    loaded: _Loaded,
    sampler: Sampler,
    chunks_may_work: bool,
    on_progress: Callable[[str, float], None],
) -> ModelRunner:
    network, cache = loaded.network, loaded.cache
    try:
        cached = CachedModel(network)
        in_chunks = probe_chunks(network, cached, tolerance_of(network.dtype)) and chunks_may_work
    except CacheError as error:
        raise ModelLoadError(f"{type(network).__name__} cannot be served: {error}") from error
    on_progress("allocating KV cache", 0.0)
    # Nothing is allocated ahead; the blocks only tell the scheduler how much may run at once.
    on_cuda = network.device.type == "cuda"
    size = loaded.size_cache(
        cached.measure_bytes_per_token() * cache.block_size,
        cuda_memory.free_bytes(network.device, cache.gpu_memory_utilization)
        if on_cuda
        else default_host_bytes(),
    )
    facts = loaded.facts(size, "per-request cache", supports_prefix_caching=False)
    return PerRequestRunner(cached, facts, sampler, in_chunks)
