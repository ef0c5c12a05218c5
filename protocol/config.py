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


class RequestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What requests may ask for, and what they get that do not say.

    Attributes:
        max_logprobs: most `logprobs` and `prompt_logprobs` per token; -1 allows the vocabulary.
        logprobs_mode: of requests that name none.
        stream_interval: likewise.
        logits_processors: classes that requests may use, as "package.module:Class".
        reasoning_start_str: what begins the model's thinking; None is "<think>", if that is a
            token of the model.
        reasoning_end_str: likewise for its end, "</think>".
        max_num_queued_reqs: most requests that wait for their first step; None is no limit.
        max_num_queued_tokens: most prompt tokens of theirs; None is no limit.
        max_unread_tokens: most tokens of a completion that its consumer has not read before the
            request is parked; None is no limit.
        lease_s: how long a request with an id outlives its client's connection, in seconds.
        lease_bytes: most memory for what such requests have produced, per session.
    """

    max_logprobs: int = 20
    logprobs_mode: Literal[
        "raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"
    ] = "raw_logprobs"
    stream_interval: int = 1
    logits_processors: tuple[str, ...] = ()
    reasoning_start_str: str | None = None
    reasoning_end_str: str | None = None
    max_num_queued_reqs: int | None = 65_536
    max_num_queued_tokens: int | None = None
    max_unread_tokens: int | None = 4096
    lease_s: float = 60.0
    lease_bytes: int = 64 * 2**20


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs in a step.

    Attributes:
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: the token budget of one step, decodes and prompt chunks alike.
        policy: "fcfs", or "priority": lower `priority` first, ties by arrival.
        long_prefill_token_threshold: most tokens of one prompt in a step that others take part
            in; 0 is no limit.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: int = 0


# The first behind standard input, output and errors.
WEIGHTS_FILE = 3


class SecurityConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who may come in over tcp; over ipc it is whoever may enter the socket's folder.

    Paths and public keys only: a secret key is read from its file by the process that needs it.

    Attributes:
        key_dir: the folder with the core's key and those of its clients (see `keys`).
        insecure_tcp: there are no keys; whoever reaches the port comes in.
        owner_key: public key of the process that has started the core, which is let in too.
    """

    key_dir: str | None = None
    insecure_tcp: bool = False
    owner_key: str = ""


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one engine-core process is told.

    Attributes:
        address: where the core binds its ROUTER: `ipc:///path` or `tcp://host:port`.
        private_dir: a folder made for this core, and those that take its place, alone. Its
            supervisor removes it; a core does so whose supervisor is gone.
        log_level: a name known to `logging`.
        weights_version: names the weights in outputs.
        has_crashed: whether the core before this one, at this address, ended by itself.
        security: who may come in.
        is_standby: load, take no address and no memory for a KV cache, and wait to be promoted by
            a second configuration, in which this is False.
        weights_file: a file descriptor that the core is given (`WEIGHTS_FILE`), of memory for
            packed weights that the cores of one engine share; None where there is none.
        max_unread_bytes: how much one client may leave unread before it is dismissed.
    """

    address: str
    private_dir: str | None = None
    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    requests: RequestConfig = RequestConfig()
    log_level: str = "WARNING"
    weights_version: str = ""
    has_crashed: bool = False
    security: SecurityConfig = SecurityConfig()
    is_standby: bool = False
    weights_file: int | None = None
    max_unread_bytes: int = 64 * 2**20
