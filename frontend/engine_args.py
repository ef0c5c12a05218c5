"""`EngineArgs`: everything an engine is started with, flat, under vLLM's names."""

import math
from dataclasses import dataclass
from typing import Literal

from footplate.frontend.watchdog import Patience
from footplate.protocol.bounds import MAX_INT, require_int, require_number
from footplate.protocol.config import (
    CacheConfig,
    CoreConfig,
    ModelConfig,
    RequestConfig,
    SchedulerConfig,
    SecurityConfig,
)
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.links import require_protected
from footplate.protocol.params import LOGPROBS_MODES


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Arguments of an engine. Bounds are checked when it is built.

    Raises:
        InvalidParameterError: a value is out of its bounds.
    """

    model: str = "demo"
    """A folder with config.json and safetensors, the name of a cached hub model, "demo" (a small
    trained model that ships with Footplate), or "fake" (no torch: a pure function of the prefix,
    for load and fault tests)."""

    tokenizer: str | None = None
    """Folder of the tokenizer; the model's own if not given."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, activations and KV cache; "auto" takes the checkpoint's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; "auto" takes CUDA when there is a GPU."""

    quantization: Literal["int8", "int4"] | None = None
    """Keep the weights of linear layers in 8 or 4 bits, with activations in 8, on CPUs. The last
    layer, which makes the logits, has 8 bits in both cases."""

    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; the model's own limit if not given."""

    block_size: int = 16
    """Tokens per KV-cache block."""

    num_gpu_blocks_override: int | None = None
    """Exact number of KV-cache blocks, on any device."""

    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache in bytes, on any device."""

    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, activations and KV cache."""

    enable_prefix_caching: bool = True
    """Keep computed prefixes and share them between requests."""

    max_num_seqs: int = 256
    """Most requests in one step."""

    max_num_batched_tokens: int = 512
    """Token budget of one step, decodes and prompt chunks alike."""

    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """First come, first served; or by the requests' priority, lower first."""

    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in a step that others take part in; 0 is no limit."""

    max_num_queued_reqs: int | None = 65_536
    """Most requests that wait for their first step; further ones are refused with a
    QueueOverflowError. None is no limit."""

    max_num_queued_tokens: int | None = None
    """Most prompt tokens of waiting requests, likewise; no limit if not given."""

    max_unread_tokens: int | None = 4096
    """Most tokens of a completion that wait for its reader. Beyond that its request is parked: it
    gives its blocks to others, and goes on when its stream is read again. No limit on None.
    Streams of which only the end is wanted are not parked."""

    max_unread_bytes: int = 64 * 2**20
    """Most bytes that wait in the engine core for a client that does not read; beyond that it is
    dismissed. When it reads again, it connects again, and its requests are sent once more."""

    lease_s: float = 60.0
    """How long a detachable request, running or ended, is kept for a client that is not there, in
    seconds."""

    lease_bytes: int = 64 * 2**20
    """Most bytes of detachable requests and their tokens that are kept for one client that is not
    there; beyond that those that ended first are forgotten."""

    max_logprobs: int = 20
    """Most `logprobs` and `prompt_logprobs` per token; -1 allows the whole vocabulary."""

    logprobs_mode: Literal[
        "raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"
    ] = "raw_logprobs"
    """What logprobs are of requests that do not say: of the model's own logits, or after everything
    that is done to them; normalised, or logits as they are."""

    stream_interval: int = 1
    """Tokens from one output of a stream to the next, of requests that do not say."""

    logits_processors: tuple[str, ...] = ()
    """Classes that requests may use, as "package.module:Class"; the engine core imports them."""

    reasoning_start_str: str | None = None
    """What begins the model's thinking, for `thinking_token_budget`; if not given, the token
    "think" in angle brackets."""

    reasoning_end_str: str | None = None
    """What ends it; if not given, the token "/think" in angle brackets."""

    threads: int | None = None
    """CPU threads of the forward pass; if not given the cores of the CPU set, or one for a very
    small model."""

    key_dir: str | None = None
    """For an engine on a tcp address: the folder with its key and those of its clients, as made by
    scripts/make_keys.py. Links are encrypted then, and nobody without a key comes in."""

    insecure_tcp: bool = False
    """For an engine on a loopback tcp address: do without keys. Every user of the machine can use
    the engine then."""

    start_timeout_s: float = 600.0
    """One deadline for all of start-up."""

    max_restarts: int = 3
    """How often the engine core may be replaced within `restart_window_s` seconds when it dies or
    hangs; once more ends the engine. 0 never replaces it."""

    restart_window_s: float = 60.0
    """See `max_restarts`."""

    stall_timeout_s: float = 5.0
    """A step that takes longer has the core write to its log where each of its threads is."""

    hang_timeout_s: float = 60.0
    """A core that gets no further for this long, or does not answer, is ended and replaced."""

    weights_version: str = ""
    """A name for the weights, told with every output; if not given, `model`. See
    `AsyncLLMEngine.replace_core`."""

    standby: bool = False
    """Keep a second core process ready, with the model loaded and no KV cache: when the core dies,
    streams go on within half a second. On CPUs both share one copy of packed weights."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
    """Of the engine core's log on standard error."""

    def __post_init__(self) -> None:
        _require_text("model", self.model)
        if self.tokenizer is not None:
            _require_text("tokenizer", self.tokenizer)
        for name in _POSITIVE_OR_NONE:
            _require_positive(name, getattr(self, name), optional=True)
        for name in _POSITIVE:
            _require_positive(name, getattr(self, name))
        require_int("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, MAX_INT)
        require_int("max_logprobs", self.max_logprobs, -1, MAX_INT)
        for name in ("reasoning_start_str", "reasoning_end_str"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        if not isinstance(self.logits_processors, list | tuple):
            raise InvalidParameterError(
                "logits_processors", self.logits_processors, 'a list of "package.module:Class"'
            )
        for path in self.logits_processors:
            _require_text("logits_processors", path)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidParameterError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"at least max_num_seqs ({self.max_num_seqs}): every running request gets a "
                "token in every step",
            )
        if not _is_number(self.gpu_memory_utilization) or not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidParameterError(
                "gpu_memory_utilization", self.gpu_memory_utilization, "above 0 and at most 1"
            )
        require_int("max_restarts", self.max_restarts, 0, MAX_INT)
        for name in _SECONDS:
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise InvalidParameterError(name, getattr(self, name), "above 0")
        require_number("lease_s", self.lease_s, 0.0, math.inf, above=True)
        if self.hang_timeout_s <= self.stall_timeout_s:
            raise InvalidParameterError(
                "hang_timeout_s",
                self.hang_timeout_s,
                f"more than stall_timeout_s, which is {self.stall_timeout_s}",
            )
        if not isinstance(self.weights_version, str):
            raise InvalidParameterError("weights_version", self.weights_version, "a string")
        if self.key_dir is not None:
            _require_text("key_dir", self.key_dir)
        for name in ("enable_prefix_caching", "insecure_tcp", "standby"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(name, getattr(self, name), "True or False")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidParameterError(name, getattr(self, name), f"one of {allowed}")

    @property
    def patience(self) -> Patience:
        """How long the core may be silent or stuck."""
        return Patience(stalled_s=self.stall_timeout_s, hung_s=self.hang_timeout_s)

    def core_config(
        self, address: str, private_dir: str | None = None, owner_key: str = ""
    ) -> CoreConfig:
        """What one engine core at `address` is told.

        Args:
            owner_key: the caller's public key, where links have keys.

        Raises:
            InvalidParameterError: the address would let in whoever comes.
        """
        require_protected(
            address, has_keys=self.key_dir is not None, insecure_tcp=self.insecure_tcp
        )
        return CoreConfig(
            address=address,
            private_dir=private_dir,
            model=ModelConfig(
                model=self.model,
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                device=self.device,
                quantization=self.quantization,
                max_model_len=self.max_model_len,
                num_threads=self.threads,
            ),
            cache=CacheConfig(
                block_size=self.block_size,
                num_gpu_blocks_override=self.num_gpu_blocks_override,
                kv_cache_memory_bytes=self.kv_cache_memory_bytes,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enable_prefix_caching=self.enable_prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                policy=self.scheduling_policy,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
            ),
            requests=RequestConfig(
                max_logprobs=self.max_logprobs,
                logprobs_mode=self.logprobs_mode,
                stream_interval=self.stream_interval,
                logits_processors=tuple(self.logits_processors),
                reasoning_start_str=self.reasoning_start_str,
                reasoning_end_str=self.reasoning_end_str,
                max_num_queued_reqs=self.max_num_queued_reqs,
                max_num_queued_tokens=self.max_num_queued_tokens,
                max_unread_tokens=self.max_unread_tokens,
                lease_s=float(self.lease_s),
                lease_bytes=self.lease_bytes,
            ),
            log_level=self.log_level,
            weights_version=self.weights_version or self.model,
            security=SecurityConfig(
                key_dir=self.key_dir, insecure_tcp=self.insecure_tcp, owner_key=owner_key
            ),
            max_unread_bytes=self.max_unread_bytes,
        )


_POSITIVE_OR_NONE = (
    "max_model_len",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
    "threads",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_unread_tokens",
)
_POSITIVE = (
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_unread_bytes",
    "lease_bytes",
    "stream_interval",
)
_SECONDS = ("start_timeout_s", "restart_window_s", "stall_timeout_s", "hang_timeout_s")
_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "quantization": (None, "int8", "int4"),
    "scheduling_policy": ("fcfs", "priority"),
    "logprobs_mode": LOGPROBS_MODES,
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}


def _require_positive(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    # The upper bound is the wire's.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        raise InvalidParameterError(name, value, "a positive integer")


def _require_text(name: str, value: object) -> None:
    # Not a Path: a name of a cached model is none, and it would not travel.
    if not isinstance(value, str) or not value:
        raise InvalidParameterError(name, value, "a folder or a name, as a string")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
