"""From what the user asks for to what the engine core acts upon: text becomes token ids, what was
left open is filled in, and what depends on the model is checked against it."""

from collections.abc import Iterable

from footplate.frontend.text import Tokenizer
from footplate.protocol.bounds import MAX_LOGIT_BIAS
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import InvalidParameterError
from footplate.protocol.messages import ModelFacts
from footplate.protocol.params import LOGPROBS_MODES, SamplingParams
from footplate.protocol.token_params import (
    Grammar,
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    ProcessorCall,
    RepetitionDetection,
    ThinkingBudget,
    TokenIds,
    TokenParams,
)

THINKING_TOKENS = ("<think>", "</think>")


def needs_tokenizer(params: SamplingParams) -> bool:
    """Whether `resolve_params` has text to encode."""
    return bool(params.bad_words) or params.thinking_token_budget is not None


def resolve_params(
    params: SamplingParams,
    *,
    seed: int,
    max_tokens: int,
    model: ModelFacts,
    requests: RequestConfig,
    tokenizer: Tokenizer | None = None,
    grammar: Grammar | None = None,
) -> TokenParams:
    """Fill in what the user left open.

    Args:
        max_tokens: as `resolve_max_tokens` has it.
        requests: what the engine allows requests to ask for.
        tokenizer: if `needs_tokenizer` says so.
        grammar: of `structured_outputs`, translated.

    Raises:
        InvalidParameterError: the model, or the engine, cannot do what is asked for.
    """
    stops = tuple(params.stop_token_ids or ())
    if params.trace_decode_token_ids is not None:
        stops = ()  # an end-of-sequence token in a trace is a token as any other
    elif not params.ignore_eos:
        stops = tuple({*stops, *model.eos_token_ids})
    repetition = params.repetition_detection
    return TokenParams(
        temperature=float(params.temperature),
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=stops,
        adjustments=_adjustments(params, model, requests, tokenizer),
        logprobs=_logprobs(params, model, requests),
        grammar=grammar,
        repetition=None
        if repetition is None
        else RepetitionDetection(
            repetition.max_pattern_size, repetition.min_pattern_size, repetition.min_count
        ),
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
    )


def _adjustments(
    params: SamplingParams,
    model: ModelFacts,
    requests: RequestConfig,
    tokenizer: Tokenizer | None,
) -> LogitAdjustments | None:
    """None for a request whose logits are left as they are, which is nearly every one."""
    bias = params.logit_bias or {}
    trace = params.trace_decode_token_ids
    is_plain = (
        not params.presence_penalty
        and not params.frequency_penalty
        and params.repetition_penalty == 1.0
        and not bias
        and params.allowed_token_ids is None
        and not params.bad_words
        and params.thinking_token_budget is None
        and trace is None
        and not params.logits_processors
    )
    if is_plain:
        return None
    _require_known("logit_bias", bias, model)
    return LogitAdjustments(
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=float(params.repetition_penalty),
        logit_bias={
            token_id: min(max(float(value), -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)
            for token_id, value in bias.items()
        },
        allowed_token_ids=_known_ids("allowed_token_ids", params.allowed_token_ids, model),
        bad_words=_bad_words(params, tokenizer),
        thinking=_thinking(params, requests, tokenizer),
        forced_token_ids=_known_ids("trace_decode_token_ids", trace, model),
        processors=tuple(
            ProcessorCall(_processor_index(name, requests), arguments)
            for name, arguments in (params.logits_processors or {}).items()
        ),
    )


def _logprobs(
    params: SamplingParams, model: ModelFacts, requests: RequestConfig
) -> LogprobsRequest | None:
    """None for a request that asks for none, which is nearly every one."""
    num_logprobs, num_prompt_logprobs = params.logprobs, params.prompt_logprobs
    ids, prompt_ids = params.logprob_token_ids, params.prompt_logprob_token_ids
    if num_logprobs is None and num_prompt_logprobs is None and ids is None and prompt_ids is None:
        return None
    ids = _known_ids("logprob_token_ids", ids, model)
    prompt_ids = _known_ids("prompt_logprob_token_ids", prompt_ids, model)
    if num_logprobs is None and ids:
        num_logprobs = 0  # these ids, beside the token itself
    if num_prompt_logprobs is None and prompt_ids:
        num_prompt_logprobs = 0
    if num_logprobs is None and num_prompt_logprobs is None:
        return None
    _require_few("logprobs", num_logprobs, requests)
    _require_few("prompt_logprobs", num_prompt_logprobs, requests)
    mode = params.logprobs_mode or requests.logprobs_mode
    return LogprobsRequest(
        num_logprobs=num_logprobs,
        token_ids=ids or (),
        num_prompt_logprobs=num_prompt_logprobs,
        prompt_token_ids=prompt_ids or (),
        prompt_start=params.prompt_logprob_start,
        mode=LogprobsMode(LOGPROBS_MODES.index(mode)),
    )


def _require_few(name: str, count: int | None, requests: RequestConfig) -> None:
    most = requests.max_logprobs
    if count is not None and most >= 0 and not 0 <= count <= most:
        raise InvalidParameterError(
            name,
            count,
            f"0 to {most}: start the engine with a larger max_logprobs, or with -1 for the whole "
            "vocabulary",
        )


def _known_ids(name: str, ids: Iterable[int] | None, model: ModelFacts) -> TokenIds | None:
    if ids is None:
        return None
    known = tuple(ids)
    _require_known(name, known, model)
    return known


def _require_known(name: str, ids: Iterable[int], model: ModelFacts) -> None:
    for token_id in ids:
        if token_id >= model.vocab_size:
            raise InvalidParameterError(
                name, token_id, f"of token ids in the vocabulary: 0 to {model.vocab_size - 1}"
            )


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[TokenIds, ...]:
    """Each word's token ids, at the start of a word and inside the text."""
    if not params.bad_words:
        return ()
    assert tokenizer is not None
    found: dict[TokenIds, None] = {}
    for word in params.bad_words:
        bare = word.lstrip()
        for form in (bare, " " + bare) if bare else (word,):
            ids = tuple(tokenizer.encode(form, add_special_tokens=False, allow_special=False))
            if ids:
                found[ids] = None
    return tuple(found)


def _thinking(
    params: SamplingParams, requests: RequestConfig, tokenizer: Tokenizer | None
) -> ThinkingBudget | None:
    budget = params.thinking_token_budget
    if budget is None:
        return None
    assert tokenizer is not None
    marks = []
    for given, usual in zip(
        (requests.reasoning_start_str, requests.reasoning_end_str), THINKING_TOKENS, strict=True
    ):
        if given is None and tokenizer.token_to_id(usual) is None:
            raise InvalidParameterError(
                "thinking_token_budget",
                budget,
                f"None: the model has no token {usual!r}; start the engine with "
                "reasoning_start_str and reasoning_end_str, if it thinks in other words",
            )
        marks.append(tuple(tokenizer.encode(given or usual, add_special_tokens=False)))
    return ThinkingBudget(budget, *marks)


def _processor_index(name: str, requests: RequestConfig) -> int:
    known = requests.logits_processors
    for index, path in enumerate(known):
        if name in (path, path.rpartition(":")[2]):
            return index
    raise InvalidParameterError(
        "logits_processors", name, f"of those that the engine was started with: {list(known)}"
    )
