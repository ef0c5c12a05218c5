"""One request inside the engine core: its tokens, its place in the cache, its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from footplate.backend.repetition import RepetitionDetector
from footplate.backend.structured.interface import CompiledGrammar
from footplate.protocol.messages import FinishReason
from footplate.protocol.token_params import TokenParams

if TYPE_CHECKING:
    from footplate.backend.quotas import Account
    from footplate.backend.siblings import Siblings


class State(Enum):
    """Where a request is in its life."""

    HELD = auto()  # known, but not to be run yet: something that it needs is still being made
    WAITING = auto()  # holds no KV blocks, has never run
    RUNNING = auto()  # holds KV blocks and takes part in every step the budget allows
    PREEMPTED = auto()  # lost its KV blocks; will recompute them
    PARKED = auto()  # holds no KV blocks, and is not to be run: nobody reads what it produces
    FINISHED = auto()  # holds no KV blocks; out of the scheduler

    __hash__ = object.__hash__  # members are singletons; Enum's own is a Python function


class Event(Enum):
    """What moves a request from state to state."""

    RELEASE = auto()
    ADMIT = auto()
    PREEMPT = auto()
    PARK = auto()
    RESUME = auto()
    FINISH = auto()

    __hash__ = object.__hash__


# The whole life of a request. What is not in this table is a bug.
TRANSITIONS = {
    (State.HELD, Event.RELEASE): State.WAITING,
    (State.HELD, Event.FINISH): State.FINISHED,
    (State.WAITING, Event.ADMIT): State.RUNNING,
    (State.WAITING, Event.PARK): State.PARKED,
    (State.WAITING, Event.FINISH): State.FINISHED,  # aborted before its first step
    (State.RUNNING, Event.PREEMPT): State.PREEMPTED,
    (State.RUNNING, Event.PARK): State.PARKED,
    (State.RUNNING, Event.FINISH): State.FINISHED,
    (State.PREEMPTED, Event.ADMIT): State.RUNNING,
    (State.PREEMPTED, Event.PARK): State.PARKED,
    (State.PREEMPTED, Event.FINISH): State.FINISHED,
    (State.PARKED, Event.RELEASE): State.WAITING,  # parked before its first step
    (State.PARKED, Event.RESUME): State.PREEMPTED,
    (State.PARKED, Event.FINISH): State.FINISHED,
}


@dataclass(slots=True, eq=False)
class Request:
    """Written by the scheduler and its parts, and the engine core says whose it is; the model
    runner reads it.

    Attributes:
        key: unique in the life of this core; runners key per-request state by it.
        client: whose it is.
        handle: the client's number for it.
        token_ids: prompt followed by output, so position i of the KV cache is token i. Siblings
            that have never run have one list in common.
        num_prompt_tokens: where the output starts in `token_ids`.
        num_prior_tokens: tokens of the output that it came with.
        share: whose share of the service it uses; its client's, unless something else is said.
        arrival: counts requests; a smaller one came first.
        arrival_time: on the core's clock, in seconds.
        max_num_tokens: of prompt and output, where the request ends at the latest.
        num_computed_tokens: length of the prefix whose keys and values are in the cache.
        block_ids: the request's block table (PagedAttention, Kwon et al., SOSP '23, section
            4.2): token i lives in block block_ids[i // block_size], at i % block_size.
        block_hashes: prefix-cache hash of every full block known so far (see `prefix_hash`).
        grammar: what the output must match, compiled; None leaves it free.
        num_scored: prompt positions whose logprobs have been told, or never will be. The logits
            behind those from here on are still wanted, so they are not taken from the cache.
        repetition: notices when the output goes round in circles; None does not look.
        siblings: the other requests of the same AddRequest; None when it is alone.
        is_unread: nobody reads what it produces. A request that is held is parked when it is
            released.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission; -1 before.
        runs_alone: nobody else takes part in its steps, until it has a new token.
        short_at: how many tokens it had when others had to make room for its next one; -1 when that
            never happened.
        account: what its client's key has in the core; None where that has no limit.
    """

    key: int
    client: bytes
    handle: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: TokenParams
    priority: int = 0
    share: bytes = b""
    arrival: int = 0
    cache_salt: str = ""
    num_prior_tokens: int = 0
    arrival_time: float = 0.0
    max_num_tokens: int = 0
    scheduled_time: float = 0.0
    state: State = State.HELD
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_cached_tokens: int = -1
    grammar: CompiledGrammar | None = None
    num_scored: int = 0
    repetition: RepetitionDetector | None = None
    siblings: Siblings | None = None
    runs_alone: bool = False
    short_at: int = -1
    is_unread: bool = False
    account: Account | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.share = self.share or self.client

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output so far, those included that it came with."""
        return len(self.token_ids) - self.num_prompt_tokens

    def advance(self, event: Event) -> None:
        """Apply one event. An event the table does not allow is an AssertionError."""
        key = (self.state, event)
        assert key in TRANSITIONS, f"request {self.key}: {event} in {self.state}"
        self.state = TRANSITIONS[key]
