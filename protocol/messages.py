"""Every message that crosses the process boundary, and nothing else.

Client to core, DEALER to ROUTER: Hello, AddRequest, AbortRequests, Goodbye, and the control calls
ResetPrefixCache and GetStats.

Core to client: Welcome, Progress and Refused answer Hello on the same socket. StepOutputs,
ControlReply and EngineFailed come from the core's PUSH to the client's PULL.

One ZeroMQ frame carries one msgpack array: the tag, then the fields in order. Fields are only
ever appended, with a default: an older peer ignores what it does not know, a newer one fills
in what is missing. A client is named by its socket's routing id, so no message repeats it.
"""

from enum import IntEnum

import msgspec

from footplate.protocol.params import TokenParams

# Major: the peers cannot talk. Minor: fields or messages were appended.
PROTOCOL_VERSION = (1, 0)


class FinishReason(IntEnum):
    """Why a request produced its last token."""

    STOP = 0  # an end-of-sequence token, a stop token or a stop string
    LENGTH = 1  # max_tokens, or the model's context window, was reached
    ABORT = 2  # the client asked, or went away
    ERROR = 3  # this request failed; `Finished.message` says why

    def __str__(self) -> str:
        return _REASON_NAMES[self]


_REASON_NAMES = {reason: reason.name.lower() for reason in FinishReason}


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all wire messages."""


# ---- client to core


class Hello(Message, tag="hello", frozen=True):
    """The first message of a client.

    Attributes:
        version: the client's `PROTOCOL_VERSION`.
        output_endpoint: the bound address of the client's PULL. Over ipc it must be the one
            that `links.output_endpoint` derives, so that a core never opens a foreign path.
    """

    version: tuple[int, int]
    output_endpoint: str


class AddRequest(Message, tag="add", frozen=True):
    """Start a request.

    Attributes:
        handle: chosen by the client, never used twice in one session.
        priority: lower runs earlier, under the priority policy.
        cache_salt: prefix-cache blocks are shared only between equal salts.
    """

    handle: int
    prompt_token_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""


class AbortRequests(Message, tag="abort", frozen=True):
    """Free everything these requests hold. Unknown and finished handles are no error: an abort
    may cross its request's last token on the wire."""

    handles: list[int]


class Goodbye(Message, tag="bye", frozen=True):
    """The client leaves: abort all of its requests and forget it."""


class ResetPrefixCache(Message, tag="reset_prefix_cache", frozen=True):
    """Forget all cached prefixes. Refused (ControlReply.ok false) while requests hold blocks."""

    call: int


class GetStats(Message, tag="get_stats", frozen=True):
    """Answered by a ControlReply with `stats`."""

    call: int


# ---- core to client


class ModelFacts(msgspec.Struct, frozen=True, array_like=True):
    """What the core found out about its model.

    Attributes:
        model: as it was asked for.
        tokenizer: a folder, or a name, that the client can load the tokenizer from.
        max_model_len: longest prompt plus output, in tokens.
        attention: which path the runner took, e.g. "paged torch" or "per-request cache".
    """

    model: str
    tokenizer: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    attention: str
    num_parameters: int = 0
    quantization: str | None = None


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """The core's limits; it owns the truth about them."""

    max_num_seqs: int
    max_num_batched_tokens: int
    policy: str
    block_size: int
    num_kv_blocks: int
    enable_prefix_caching: bool


class Welcome(Message, tag="welcome", frozen=True):
    """The core is ready and knows the client.

    Attributes:
        epoch: random per core process; outputs of another epoch are not for this session.
        phases: seconds that each phase of start-up took.
    """

    epoch: int
    version: tuple[int, int]
    model: ModelFacts
    limits: Limits
    process_id: int
    phases: dict[str, float]


class Progress(Message, tag="progress", frozen=True):
    """The core is still starting."""

    phase: str
    fraction: float


class Refused(Message, tag="refused", frozen=True):
    """The core will not serve this client, or could not start.

    Attributes:
        kind: "protocol" (versions differ), "start" (start-up failed), "address" (another process
            holds it), "hello" (malformed) or "dismissed" (too much was left unread).
    """

    kind: str
    reason: str


class Started(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sent once, with a request's first token."""

    handle: int
    num_cached_tokens: int
    queue_time_s: float
    prefill_time_s: float


class Finished(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sent once, with or after a request's last token."""

    handle: int
    reason: FinishReason
    message: str = ""


class StepOutputs(Message, tag="out", frozen=True):
    """Everything one engine step produced for one client: it wakes up once per step, not once
    per token.

    Columns: request `handles[i]` has `counts[i]` new tokens (an empty `counts` means one
    each), the first of them at output position `positions[i]`; `token_ids` holds all runs one
    after the other. The side tables are sparse.
    """

    epoch: int
    handles: list[int]
    positions: list[int]
    token_ids: list[int]
    counts: list[int] = []
    started: list[Started] = []
    finished: list[Finished] = []


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """The core's books at the end of a step. Token counts are totals since the start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_bad_messages: int


class ControlReply(Message, tag="reply", frozen=True):
    """The answer to the control call of the same number."""

    call: int
    ok: bool
    message: str = ""
    stats: Stats | None = None


class EngineFailed(Message, tag="failed", frozen=True):
    """The last message of a core that must end."""

    cause: str


ClientMessage = Hello | AddRequest | AbortRequests | Goodbye | ResetPrefixCache | GetStats
CoreMessage = Welcome | Progress | Refused | StepOutputs | ControlReply | EngineFailed
