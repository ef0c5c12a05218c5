"""What a stream yields. Names and meanings are vLLM's."""

import msgspec

from footplate.frontend.logprobs import Logprobs

WeightsVersions = tuple[tuple[int, str], ...]


class RequestMetrics(msgspec.Struct):
    """When things happened to a request; one object per request, filled in as it goes.

    Attributes:
        arrival_time: wall clock, seconds since the epoch; for logs only.
        arrival: the client's monotonic clock when the request was accepted, as are
            `first_token` and `last_token` for the arrival of tokens.
        queue_time_s: from the core's receiving the request to its first step.
        prefill_time_s: from its first step to its first token, in the core.
    """

    arrival_time: float
    arrival: float
    first_token: float | None = None
    last_token: float | None = None
    queue_time_s: float | None = None
    prefill_time_s: float | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        """As the client saw it."""
        return None if self.first_token is None else self.first_token - self.arrival


class CompletionOutput(msgspec.Struct, gc=False):
    """One completion of a prompt.

    Attributes:
        text: all of it, or what is new, as `output_kind` says. Empty without detokenizing.
        token_ids: likewise.
        finish_reason: None while the stream goes on.
        stop_reason: the stop string or stop token that ended it; None for the model's own
            end of sequence.
        logprobs: of `token_ids`, position by position; None if they were not asked for. Cumulative
            outputs of one stream share the dictionaries: to change one, copy it.
        cumulative_logprob: the sum over all tokens so far, likewise.
        weights_versions: from which output position on which weights made the tokens, as (position,
            `EngineArgs.weights_version`); more than one entry after `replace_core`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None
    cumulative_logprob: float | None = None
    weights_versions: WeightsVersions = ()

    @property
    def finished(self) -> bool:
        """Whether this is the completion's last output."""
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, gc=False):
    """What a request has produced.

    Attributes:
        prompt: as text, if it was given as text or as messages.
        outputs: completions with news, by index; all of them with `FINAL_ONLY`.
        finished: whether this is the request's last output.
        seed: the seed that was used, also when none was given; completion i had seed + i.
        num_cached_tokens: how many prompt tokens came from the prefix cache; None before the
            first token.
        prompt_logprobs: one entry per prompt token, None for those that were not scored (the
            first one never is); None if they were not asked for. With `DELTA` in the first
            output only.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    seed: int
    metrics: RequestMetrics
    num_cached_tokens: int | None = None
    prompt_logprobs: Logprobs | None = None
