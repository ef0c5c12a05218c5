"""Whether the core takes a request, and what it becomes.

The client has checked all this with better words; a core that believed it could be ended by one
bad client. What only makes a request useless to its owner is let through.
"""

from collections.abc import Collection, Container
from math import inf, isfinite

import msgspec

from footplate.backend.backlog import Backlog
from footplate.backend.repetition import RepetitionDetector
from footplate.backend.request import Request
from footplate.protocol.bounds import MAX_N, MAX_REPETITION_PATTERN, MAX_SEED
from footplate.protocol.config import RequestConfig
from footplate.protocol.messages import AddRequest, ErrorKind, FinishReason, ModelFacts
from footplate.protocol.token_params import LogitAdjustments, LogprobsRequest, TokenParams

MAX_HANDLE = 2**63 - 1


class RefusalError(Exception):
    """A request is not taken; the message says why."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.INVALID) -> None:
        super().__init__(message)
        self.kind = kind


def handles_of(message: AddRequest) -> range:
    """The handles that a message is about, as far as it makes sense."""
    is_range = 1 <= message.n <= MAX_N and message.handle + message.n - 1 <= MAX_HANDLE
    return range(message.handle, message.handle + (message.n if is_range else 1))


def make_requests(
    client: bytes, message: AddRequest, first_key: int, now: float, share: bytes = b""
) -> list[Request]:
    """The requests of a valid message. They have one list of tokens until they run.

    Args:
        share: see `Request`.
    """
    params, prompt = message.params, message.prompt_token_ids
    first = Request(
        key=first_key,
        client=client,
        handle=message.handle,
        token_ids=prompt + message.prior_token_ids if message.prior_token_ids else prompt,
        num_prompt_tokens=len(prompt),
        params=params,
        priority=message.priority,
        share=share,
        cache_salt=message.cache_salt,
        num_prior_tokens=len(message.prior_token_ids),
        arrival_time=now - message.age_s,
        runs_alone=message.run_alone,
    )
    requests = [first]
    for index in range(1, message.n):
        requests.append(_sibling(first, index))
    return requests


def _sibling(first: Request, index: int) -> Request:
    # Seeds go round at the largest one, so that every child's can be given to a request of its own.
    seed = (first.params.seed + index) & MAX_SEED
    return Request(
        key=first.key + index,
        client=first.client,
        handle=first.handle + index,
        token_ids=first.token_ids,
        num_prompt_tokens=first.num_prompt_tokens,
        params=msgspec.structs.replace(first.params, seed=seed),
        priority=first.priority,
        share=first.share,
        cache_salt=first.cache_salt,
        num_prior_tokens=first.num_prior_tokens,
        arrival_time=first.arrival_time,
        runs_alone=first.runs_alone,
    )


class Admission:
    """Refuses what the core cannot serve. Knows the model's limits and the engine's."""

    def __init__(self, model: ModelFacts, config: RequestConfig) -> None:
        self._max_model_len = model.max_model_len
        self._vocab_size = model.vocab_size
        self._config = config

    def check(self, message: AddRequest, live: Container[int], backlog: Backlog) -> None:
        """Pass, or say why not.

        Args:
            live: the handles that the client has in use.

        Raises:
            RefusalError: with words for the client.
        """
        if not 1 <= message.n <= MAX_N:
            raise RefusalError(f"n is {message.n}, must be 1 to {MAX_N}")
        if message.handle + message.n - 1 > MAX_HANDLE:
            raise RefusalError(f"handle {message.handle} is too large")
        for handle in range(message.handle, message.handle + message.n):
            if handle in live:
                raise RefusalError(f"handle {handle} is in use")
        if message.request_id is not None:
            _check_is_plain(message)
        self._check_prompt(message.prompt_token_ids)
        self._check_params(message.params)
        if message.prior_token_ids:
            self._check_prior(message)
        if message.age_s:
            _check_seconds("age_s", message.age_s)
        if message.ttft_deadline_s is not None:
            _check_seconds("ttft_deadline_s", message.ttft_deadline_s)
        if message.deadline_s is not None:
            _check_seconds("deadline_s", message.deadline_s)
        if not message.is_replay:
            self._check_queue(message, backlog)

    def _check_queue(self, message: AddRequest, backlog: Backlog) -> None:
        if (limit := self._config.max_num_queued_reqs) is not None:
            _check_room("reqs", limit, backlog.num_requests, message.n)
        if (limit := self._config.max_num_queued_tokens) is not None:
            num_tokens = len(message.prompt_token_ids)
            _check_room("tokens", limit, backlog.num_tokens, num_tokens)

    def _check_prompt(self, prompt: list[int]) -> None:
        limit = self._max_model_len
        if not 0 < len(prompt) < limit:
            raise RefusalError(f"the prompt has {len(prompt)} tokens, must be 1 to {limit - 1}")
        self._check_ids("", prompt)

    def _check_ids(self, of: str, token_ids: Collection[int]) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            raise RefusalError(f"token ids{of} must be 0 to {self._vocab_size - 1}")

    def end_of_prior(self, message: AddRequest) -> FinishReason | None:
        """Why the prior output of a valid message has come to its end, if it has. The core that
        produced it ended before it could tell. Grammars are not looked at.
        """
        prior = message.prior_token_ids
        if not prior or not message.is_replay:
            return None
        params, num_tokens = message.params, len(message.prompt_token_ids) + len(prior)
        # In the order of `reason_to_stop`.
        if len(prior) > params.min_tokens and prior[-1] in params.stop_token_ids:
            return FinishReason.STOP
        if len(prior) >= params.max_tokens or num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return FinishReason.REPETITION if _is_repetitive(params, prior) else None

    def _check_prior(self, message: AddRequest) -> None:
        """Refuse a prior output that nobody can have produced; and one that has come to its end,
        unless its request is run again and has to be told so."""
        params, prior = message.params, message.prior_token_ids
        may_have_ended = message.is_replay
        num_tokens = len(message.prompt_token_ids) + len(prior)
        limit = self._max_model_len - 1 + may_have_ended
        if num_tokens > limit:
            raise RefusalError(
                f"prompt and prior output have {num_tokens} tokens, must be at most {limit}"
            )
        if len(prior) >= params.max_tokens + may_have_ended:
            raise RefusalError(
                f"there are {len(prior)} tokens of output already, must be "
                f"{'at most' if may_have_ended else 'fewer than'} max_tokens, which is "
                f"{params.max_tokens}"
            )
        self._check_ids(" of the prior output", prior)
        could_stop = prior[params.min_tokens :]
        if may_have_ended:
            could_stop = could_stop[:-1]
        if not set(params.stop_token_ids).isdisjoint(could_stop):
            raise RefusalError("the prior output has a stop token, which would have ended it")
        if not may_have_ended and _is_repetitive(params, prior):
            raise RefusalError("the prior output is repetitive, which would have ended it")

    def _check_params(self, params: TokenParams) -> None:
        if not isfinite(params.temperature + params.top_p + params.min_p):
            raise RefusalError("temperature, top_p and min_p must be finite")
        if not 0 <= params.seed <= MAX_SEED:
            raise RefusalError(f"seed is {params.seed}, must be 0 to {MAX_SEED}")
        if params.adjustments is not None:
            self._check_adjustments(params.adjustments)
        if params.logprobs is not None:
            self._check_logprobs(params.logprobs)
        repetition = params.repetition
        if repetition is not None and not (
            1
            <= repetition.min_pattern_size
            <= repetition.max_pattern_size
            <= MAX_REPETITION_PATTERN
        ):
            raise RefusalError(
                f"min_pattern_size is {repetition.min_pattern_size}, must be 1 to "
                f"max_pattern_size, which is {repetition.max_pattern_size}, must be at most "
                f"{MAX_REPETITION_PATTERN}"
            )

    def _check_adjustments(self, wanted: LogitAdjustments) -> None:
        numbers = (
            wanted.presence_penalty,
            wanted.frequency_penalty,
            wanted.repetition_penalty,
            *wanted.logit_bias.values(),
        )
        if not all(map(isfinite, numbers)):
            raise RefusalError("penalties and logit_bias must be finite")
        self._check_ids(" of logit_bias", wanted.logit_bias)
        self._check_ids(" of allowed_token_ids", wanted.allowed_token_ids or ())
        self._check_ids(" of forced_token_ids", wanted.forced_token_ids or ())
        for word in wanted.bad_words:
            self._check_ids(" of bad_words", word)
        if wanted.thinking is not None:
            self._check_ids(" of thinking", wanted.thinking.start_ids + wanted.thinking.end_ids)
        num_processors = len(self._config.logits_processors)
        for call in wanted.processors:
            if not 0 <= call.index < num_processors:
                raise RefusalError(
                    f"logits processor {call.index} does not exist, there are {num_processors}"
                )

    def _check_logprobs(self, wanted: LogprobsRequest) -> None:
        # What the engine allows (`max_logprobs`) is the client's to check.
        for name in ("num_logprobs", "num_prompt_logprobs"):
            count = getattr(wanted, name)
            if count is not None and not -1 <= count <= self._vocab_size:
                raise RefusalError(f"{name} is {count}, must be -1 to {self._vocab_size}")
        self._check_ids(" of logprobs", wanted.token_ids + wanted.prompt_token_ids)


def _is_repetitive(params: TokenParams, prior: list[int]) -> bool:
    return (
        params.repetition is not None
        and len(prior) >= params.min_tokens
        and RepetitionDetector(params.repetition, prior).is_repeating
    )


def _check_is_plain(message: AddRequest) -> None:
    """What is kept of a request with an id is its tokens."""
    if message.n > 1:
        raise RefusalError(f"n is {message.n}, with a request_id it must be 1")
    if message.params.logprobs is not None:
        raise RefusalError("a request with a request_id cannot have logprobs")


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 <= seconds < inf:  # NaN neither
        raise RefusalError(f"{name} is {seconds}, must be finite and at least 0")


def _check_room(what: str, limit: int, count: int, more: int) -> None:
    if count + more > limit:
        raise RefusalError(
            f"{count} are queued and {more} more would exceed max_num_queued_{what}, which is "
            f"{limit}",
            ErrorKind.OVERFLOW,
        )
