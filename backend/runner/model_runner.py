"""Loading a model: weights, the choice between paged and per-request attention, the KV cache."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
from footplate.backend.runner.shared_weights import SharedWeights
from footplate.backend.runner.thread_governor import ThreadGovernor
from footplate.backend.runner.torch_attention import TorchAttention
from footplate.backend.runner.warm_up import warm_up
from footplate.backend.step import MakeRunner, ModelRunner, OnProgress, RunnerFacts
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.messages import ModelFacts

logger = logging.getLogger(__name__)

# Weights that one core reads in about a millisecond.
SMALL_MODEL_BYTES = 32 * 2**20


def load_model_runner(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    on_progress: OnProgress,
    touched: TouchedMemory | None = None,
    processors: Sequence[type[LogitsProcessor]] = (),
) -> ModelRunner:
    """Load a model and everything it needs to run, ready for its first step: see
    `prepare_model_runner`."""
    make = prepare_model_runner(model, cache.block_size, on_progress, touched, processors)
    return make(cache, scheduler, on_progress)


def prepare_model_runner(
    model: ModelConfig,
    block_size: int,
    on_progress: OnProgress,
    touched: TouchedMemory | None = None,
    processors: Sequence[type[LogitsProcessor]] = (),
    *,
    is_standby: bool = False,
    weights_file: int | None = None,
) -> MakeRunner:
    """Load a model, and do all that can be done before there is a KV cache.

    Args:
        block_size: of the cache that there will be.
        on_progress: told of each phase as it begins.
        touched: for a KV cache on the CPU.
        processors: custom logits processors that requests may use.
        is_standby: on a GPU, keep the weights in host memory until the runner is made: the GPU's
            memory is for the core that serves.
        weights_file: see `CoreConfig`; for weights packed for our CPU kernels.

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
    network = load_model(folder, config, model, device)
    num_parameters = sum(p.numel() for p in network.parameters())
    wanted_len = model.max_model_len or limits.paged
    loaded = _Loaded(model, folder, network, num_parameters, wanted_len, block_size)
    shared = None
    if weights_file is not None and device.type == "cpu":
        # Padding makes packed matrices a little larger than those they are made from.
        most = 2 * sum(p.nbytes for p in network.parameters()) + 2**26
        shared = SharedWeights(weights_file, most, may_fill=not is_standby)
    if is_standby and device.type != "cpu":

        def make(cache: CacheConfig, scheduler: SchedulerConfig, report: OnProgress) -> ModelRunner:
            later = _put_to_work(loaded, limits.paged, device, report, None, processors, None)
            return later(cache, scheduler, report)

        return make
    return _put_to_work(loaded, limits.paged, device, on_progress, touched, processors, shared)


def _put_to_work(
    loaded: "_Loaded",
    paged_len: int,
    device: torch.device,
    on_progress: OnProgress,
    touched: TouchedMemory | None,
    processors: Sequence[type[LogitsProcessor]],
    shared: SharedWeights | None,
) -> MakeRunner:
    """Find out how the model is best run on `device`, and pack its weights for that.

    Args:
        paged_len: the longest sequence that a paged cache can hold.
    """
    model, block_size, wanted_len = loaded.requested, loaded.block_size, loaded.wanted_len
    network = loaded.network.to(device)
    torch.set_num_threads(model.num_threads or _default_num_threads(network))
    on_progress("checking attention", 0.0)
    own_kernels = _load_kernels(network, block_size)
    mapped = MappedWeights(loaded.folder)
    if model.quantization and own_kernels is None:
        raise ModelLoadError(
            f"quantization={model.quantization!r} needs the CPU kernels, and there are none: they "
            "want device='cpu', a C++ compiler, float32 or bfloat16, and a block_size that is a "
            f"multiple of 16 (here {network.device.type}, {network.dtype}, {block_size})"
        )
    sampler = Sampler(own_kernels, processors)
    try:
        if wanted_len > paged_len:
            raise NotPagedError(f"beyond {paged_len} tokens its positions are encoded anew")
        backend: AttentionBackend[Any, Any] = TorchAttention(device, block_size)
        if own_kernels is not None:
            backend = CpuAttention(own_kernels, block_size)
        windows = attention_windows(network.config, wanted_len)
        # Quantised, a model takes half its memory and less. It should not need all of it to start.
        saves_memory = mapped.released_after_use if model.quantization else nullcontext
        with saves_memory(network):
            shapes = probe_paged(network, backend, block_size, windows)
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
        make = _prepare_per_request(loaded, sampler, wanted_len <= paged_len)
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
                block_size=block_size,
                max_model_len=wanted_len,
                mapped=mapped,
                quantization=model.quantization,
                shared=shared,
            )
            backend = CpuAttention(own_kernels, block_size, touched)
        make = partial(_paged_runner, loaded, backend, shapes, direct, sampler)

    def make_runner(
        cache: CacheConfig, scheduler: SchedulerConfig, report: OnProgress
    ) -> ModelRunner:
        report("allocating KV cache", 0.0)
        runner = make(cache, scheduler)
        report("warming up", 0.0)
        warm_up(runner)
        return runner

    return make_runner


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model with its weights, and what it was asked for with."""

    requested: ModelConfig
    folder: Path
    network: Any
    num_parameters: int
    wanted_len: int
    block_size: int

    def size_cache(
        self,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        bytes_per_block: int,
        budget_bytes: int,
    ) -> CacheSize:
        return size_cache(
            cache,
            scheduler,
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


def _pack_for_torch(network: Any, mapped: MappedWeights, on_progress: OnProgress) -> None:
    if network.device.type == "cpu":
        on_progress("packing weights", 0.0)
        pack_linears(network, mapped)


def _paged_runner(
    loaded: _Loaded,
    backend: AttentionBackend[Any, Any],
    shapes: Mapping[int, LayerShape],
    direct: Forward | None,
    sampler: Sampler,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
) -> ModelRunner:
    network = loaded.network
    bytes_per_block = sum(backend.bytes_per_block(shape) for shape in shapes.values())
    budget_bytes = _budget_bytes(loaded, backend, shapes, cache, scheduler)
    size = loaded.size_cache(cache, scheduler, bytes_per_block, budget_bytes)
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
    return PagedRunner(paged, facts, loaded.block_size, sampler, governor)


def _budget_bytes(
    loaded: _Loaded,
    backend: AttentionBackend[Any, Any],
    shapes: Mapping[int, LayerShape],
    cache: CacheConfig,
    scheduler: SchedulerConfig,
) -> int:
    """What the KV cache may take when nobody says how much, in bytes."""
    device = loaded.network.device
    if device.type == "cpu":
        return default_host_bytes()
    if cache.num_gpu_blocks_override is not None or cache.kv_cache_memory_bytes is not None:
        return 0  # the user has said it; a profiling step would only cost time
    step_bytes = cuda_memory.largest_step_bytes(
        loaded.network,
        backend,
        shapes,
        block_size=loaded.block_size,
        num_tokens=scheduler.max_num_batched_tokens,
        num_seqs=scheduler.max_num_seqs,
        max_model_len=loaded.wanted_len,
    )
    return max(0, cuda_memory.free_bytes(device, cache.gpu_memory_utilization) - step_bytes)


def _prepare_per_request(
    loaded: _Loaded, sampler: Sampler, chunks_may_work: bool
) -> Callable[[CacheConfig, SchedulerConfig], ModelRunner]:
    network = loaded.network
    try:
        cached = CachedModel(network)
        in_chunks = probe_chunks(network, cached, tolerance_of(network.dtype)) and chunks_may_work
    except CacheError as error:
        raise ModelLoadError(f"{type(network).__name__} cannot be served: {error}") from error

    def make(cache: CacheConfig, scheduler: SchedulerConfig) -> ModelRunner:
        # Nothing is allocated ahead; the blocks only tell the scheduler how much may run at once.
        on_cuda = network.device.type == "cuda"
        size = loaded.size_cache(
            cache,
            scheduler,
            cached.measure_bytes_per_token() * loaded.block_size,
            cuda_memory.free_bytes(network.device, cache.gpu_memory_utilization)
            if on_cuda
            else default_host_bytes(),
        )
        facts = loaded.facts(size, "per-request cache", supports_prefix_caching=False)
        return PerRequestRunner(cached, facts, sampler, in_chunks)

    return make
