"""How an engine core is started: small frozen structs, each component takes only its own.

They travel as one `CoreConfig` over the pipe that the core inherits. What start-up discovers
(number of KV blocks, vocabulary) is not filled in here: it comes back in `Welcome`.
"""

from typing import Literal

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which model to load, and how.

    Attributes:
        model: a folder with config.json and safetensors, the name of a cached hub model,
            "demo" (a small trained model that ships with Footplate) or "fake" (no torch; the
            next token is a pure function of the prefix).
        tokenizer: folder of the tokenizer; None is the model's own.
        dtype: "auto" takes the checkpoint's.
        device: "auto" takes CUDA when there is a GPU.
        quantization: of linear layers, on CPUs with our kernels. Weights get a scale per output
            ("int8"), or per output and 128 inputs ("int4"; the last layer stays at 8 bits), and
            activations 8 bits, each token for itself. None leaves weights in `dtype`. The fake
            model has none to quantise.
        max_model_len: longest prompt plus output, in tokens; None takes the model's own limit.
        num_threads: CPU threads of the forward pass; None takes all cores of the CPU set, and
            one for a model so small that threads would only wait for each other.
    """

    model: str = "demo"
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["int8", "int4"] | None = None
    max_model_len: int | None = None
    num_threads: int | None = None


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache.

    Its size is, in this order: `num_gpu_blocks_override` blocks; `kv_cache_memory_bytes` bytes;
    what `gpu_memory_utilization` leaves of a GPU's memory, or a share of the free host memory.
    The names are vLLM's, on every device.
    """

    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs in a step.

    Attributes:
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: the token budget of one step, decodes and prompt chunks alike.
        policy: "fcfs", or "priority": lower `priority` first, ties by arrival.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    policy: Literal["fcfs", "priority"] = "fcfs"


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one engine-core process is told.

    Attributes:
        address: where the core binds its ROUTER: `ipc:///path` or `tcp://127.0.0.1:port`.
        private_dir: a folder made for this core alone; the core removes it when it ends.
        log_level: a name known to `logging`.
    """

    address: str
    private_dir: str | None = None
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    log_level: str = "WARNING"
