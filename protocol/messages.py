"""Every message that crosses the process boundary, and nothing else.

Client to core, DEALER to ROUTER: Hello, Ping, AddRequest, AttachRequest, AbortRequests,
ParkRequests, ResumeRequests, Goodbye, and the control calls ResetPrefixCache, GetStats and Drain.

Core to client: Welcome, Progress and Refused answer Hello on the same socket, as Pong does Ping.
StepOutputs, Attached, ControlReply, EngineFailed and EngineStopping come from the core's PUSH to
the client's PULL.

One ZeroMQ frame carries one msgpack array: the tag, then the fields in order. Fields are only
ever appended, with a default: an older peer ignores what it does not know, a newer one fills
in what is missing. A client is named by its socket's routing id, so no message repeats it.
Messages of a client that belong together may be frames of one ZeroMQ message, which arrives as a
whole: so the requests of one step of a beam search run in one step of the engine.
"""

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from footplate.protocol.bounds import MAX_N, MAX_REQUEST_ID_CHARS, MAX_SESSION_BYTES
from footplate.protocol.config import RequestConfig
from footplate.protocol.token_params import TokenParams

# Major: the peers cannot talk. Minor: fields or messages were appended.
PROTOCOL_VERSION = (1, 2)


class FinishReason(IntEnum):
    """Why a request produced its last token."""

    STOP = 0  # an end-of-sequence token, a stop token or a stop string
    LENGTH = 1  # max_tokens, or the model's context window, was reached
    ABORT = 2  # the client asked, or went away
    ERROR = 3  # this request failed; `Finished.message` says why
    DEADLINE = 4  # `deadline_s` or `ttft_deadline_s` has passed
    REPETITION = 5  # the output went round in circles, as `repetition_detection` has it

    def __str__(self) -> str:
        return _REASON_NAMES[self]


_REASON_NAMES = {reason: reason.name.lower() for reason in FinishReason}


class ErrorKind(IntEnum):
    """What went wrong with a request that finished with `FinishReason.ERROR`."""

    INTERNAL = 0  # in the core
    INVALID = 1  # the request cannot be served as it stands
    OVERFLOW = 2  # too much is waiting already
    GRAMMAR = 3  # the grammar does not compile, is too large, or allows nothing more
    PROCESSOR = 4  # a custom logits processor raised
    LOGITS = 5  # the logits are no distribution: NaN, infinity, or no token is possible
    MEMORY = 6  # a step with this request alone does not fit into memory
    DRAINING = 7  # the engine takes no new requests, because it is about to end
    LOST = 8  # there is nothing of this id to attach to


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all wire messages."""


# ---- client to core


class Hello(Message, tag="hello", frozen=True):
    """The first message of a client.

    Attributes:
        version: the client's `PROTOCOL_VERSION`.
        output_endpoint: the bound address of the client's PULL. Over ipc it must be the one
            that `links.output_endpoint` derives, so that a core never opens a foreign path.
        session: names the client across connections: a routing id lasts for one. Whoever knows
            it can take over what its requests have produced. Empty: nothing outlives this
            connection.
        output_key: the public key of the client's PULL on links that are encrypted (Z85).
    """

    version: tuple[int, int]
    output_endpoint: str
    session: Annotated[bytes, Meta(max_length=MAX_SESSION_BYTES)] = b""
    output_key: str = ""


class Ping(Message, tag="ping", frozen=True):
    """Are you alive? Answered by the thread that hears it, also during a step."""

    number: int


class AddRequest(Message, tag="add", frozen=True):
    """Start a request.

    Attributes:
        handle: chosen by the client, never used twice by one client object.
        priority: lower runs earlier, under the priority policy.
        cache_salt: prefix-cache blocks are shared only between equal salts.
        n: how many requests this is: handles `handle` to `handle` + n - 1, the i-th of them with
            the i-th next seed.
        prior_token_ids: output that there is already. The request goes on behind it: positions,
            noise, penalties, limits and grammar count it.
        age_s: how long ago the request arrived, in seconds.
        ttft_deadline_s: most seconds from arrival to the first token.
        deadline_s: most seconds from arrival to the last token.
        is_replay: another core had taken it in: no limit of the queue applies.
        run_alone: no other request takes part in its steps until it has a new token: cores have
            ended in steps that it took part in.
        request_id: under which it can be attached to when its client has gone and come back;
            None ends it with its client.
    """

    handle: int
    prompt_token_ids: list[int]
    params: TokenParams
    priority: int = 0
    cache_salt: str = ""
    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    prior_token_ids: list[int] = []
    age_s: Annotated[float, Meta(ge=0)] = 0.0
    ttft_deadline_s: float | None = None
    deadline_s: float | None = None
    is_replay: bool = False
    run_alone: bool = False
    request_id: Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS)] | None = None


class AttachRequest(Message, tag="attach", frozen=True):
    """Go on with a request that this session had under `request_id`, in this connection or one
    before. Answered by `Attached` and all of its tokens from position 0 on, or by its end.

    Attributes:
        handle: its new one.
    """

    handle: int
    request_id: str


class AbortRequests(Message, tag="abort", frozen=True):
    """Free everything these requests hold. Unknown and finished handles are no error: an abort
    may cross its request's last token on the wire.

    Attributes:
        have_ended: a stop string has ended them in the client: of those with a `request_id` that
            end is kept, as any other. Otherwise nobody wants them, and nothing of them is kept.
    """

    handles: list[int]
    have_ended: bool = False


class ParkRequests(Message, tag="park", frozen=True):
    """Nobody reads what these produce: run them no further, and give what they hold to others.
    Unknown and finished handles are no error."""

    handles: list[int]


class ResumeRequests(Message, tag="resume", frozen=True):
    """Run these again. Handles that are not parked are no error."""

    handles: list[int]


class Goodbye(Message, tag="bye", frozen=True):
    """The client leaves: abort all of its requests and forget it."""


class ResetPrefixCache(Message, tag="reset_prefix_cache", frozen=True):
    """Forget all cached prefixes. Refused (ControlReply.ok false) while requests hold blocks."""

    call: int


class GetStats(Message, tag="get_stats", frozen=True):
    """Answered by a ControlReply with `stats`."""

    call: int


class Drain(Message, tag="drain", frozen=True):
    """Take no new requests; answered when there is none left.

    Attributes:
        timeout_s: then those that are left end with `FinishReason.ABORT`. None waits for ever.
    """

    call: int
    timeout_s: float | None = None


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
        requests: what requests may ask for.
        suspects: handles of this session's requests that took part in the step in which the core
            before this one ended.
        has_crashed: whether that core ended by itself; False when it was killed from outside,
            and when there was none.
        weights_version: as it was given to the engine.
        num_suspects: how many took part in that step, those of other sessions among them.
        role: what this client may ask for: "generate", or "admin", who may also ask for what
            concerns the others.
    """

    epoch: int
    version: tuple[int, int]
    model: ModelFacts
    limits: Limits
    process_id: int
    phases: dict[str, float]
    requests: RequestConfig = RequestConfig()
    suspects: list[int] = []
    has_crashed: bool = False
    weights_version: str = ""
    num_suspects: int = 0
    role: str = "admin"


class Pong(Message, tag="pong", frozen=True):
    """What the core is doing.

    Attributes:
        number: of the Ping.
        num_steps: steps begun since the core's start.
        is_busy: whether it is inside a step; False is idle, which is not hung.
        step_age_s: how long it has been there, in seconds.
    """

    number: int
    epoch: int
    num_steps: int
    is_busy: bool
    step_age_s: float


# The phase of a standby that has loaded all it can.
STANDING_BY = "standing by"


class Progress(Message, tag="progress", frozen=True):
    """The core is still starting."""

    phase: str
    fraction: float


class Refused(Message, tag="refused", frozen=True):
    """The core will not serve this client, or could not start.

    Attributes:
        kind: "protocol" (versions differ), "start" (start-up failed), "address" (another process
            holds it), "hello" (malformed), "dismissed" (too much was left unread), "superseded"
            (the session has another connection) or "revoked" (the client's key is no longer
            valid).
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
    kind: ErrorKind = ErrorKind.INTERNAL


class LogprobRows(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Scores of consecutive tokens of one request, in rows of equal length.

    The first entry of a row is the token itself: the one that was sampled, or that stands in the
    prompt. Then come the most likely ones, best first, and then those that were asked for by id.

    Attributes:
        position: of the first row: an output position, or one of the prompt.
        ranks: one per row: how many tokens are more likely than the row's own, plus one.
        token_ids: 32-bit little-endian integers, row by row.
        logprobs: 32-bit little-endian floats, as many.
    """

    handle: int
    position: int
    ranks: list[int]
    token_ids: bytes
    logprobs: bytes


class StepOutputs(Message, tag="out", frozen=True):
    """Everything one engine step produced for one client: it wakes up once per step, not once
    per token.

    Columns: request `handles[i]` has `counts[i]` new tokens (an empty `counts` means one
    each), the first of them at output position `positions[i]`; `token_ids` holds all runs one
    after the other. The side tables are sparse.

    Attributes:
        logprobs: of new tokens of requests that asked for them.
        prompt_logprobs: likewise for tokens of prompts, in order, before the first output token.
    """

    epoch: int
    handles: list[int]
    positions: list[int]
    token_ids: list[int]
    counts: list[int] = []
    started: list[Started] = []
    finished: list[Finished] = []
    logprobs: list[LogprobRows] = []
    prompt_logprobs: list[LogprobRows] = []


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """The core's books at the end of a step. Token counts are totals since the start.

    Attributes:
        num_parked: requests whose client does not read.
        num_detached: requests that run, or have ended, without their client.
        num_void_steps: steps that raised and were run again in parts.
        num_corrupted_requests: ended because their logits were no distribution.
        num_rejected_peers: connections that were not let in.
    """

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
    num_parked: int = 0
    num_detached: int = 0
    num_void_steps: int = 0
    num_corrupted_requests: int = 0
    num_rejected_peers: int = 0


class ControlReply(Message, tag="reply", frozen=True):
    """The answer to the control call of the same number."""

    call: int
    ok: bool
    message: str = ""
    stats: Stats | None = None


class EngineFailed(Message, tag="failed", frozen=True):
    """The last message of a core that must end."""

    cause: str


class Attached(Message, tag="attached", frozen=True):
    """The request that an `AttachRequest` has found; its tokens follow.

    Attributes:
        handle: the new one.
        request: as it was added, under its old handle, and as old as it is now.
    """

    handle: int
    request: AddRequest


class EngineStopping(Message, tag="stopping", frozen=True):
    """The last message of a core that was told to end: no other will take its place."""

    reason: str


ClientMessage = (
    Hello
    | Ping
    | AddRequest
    | AttachRequest
    | AbortRequests
    | ParkRequests
    | ResumeRequests
    | Goodbye
    | ResetPrefixCache
    | GetStats
    | Drain
)
CoreMessage = (
    Welcome
    | Progress
    | Refused
    | Pong
    | StepOutputs
    | Attached
    | ControlReply
    | EngineFailed
    | EngineStopping
)
