"""How a request goes on in another core, behind what its stream has received."""

from msgspec.structs import replace

from footplate.frontend.completion import Completion
from footplate.frontend.stream import RequestStream
from footplate.protocol.bounds import MAX_SEED
from footplate.protocol.messages import AddRequest
from footplate.protocol.token_params import RepetitionDetection, TokenParams


def continuation(stream: RequestStream, now: float) -> list[AddRequest]:
    """What to send, so that every completion of this stream that has not ended goes on.

    Nothing but the request and its tokens so far decides what comes next, so it goes on exactly.
    Its clock goes on too. Where the newest token was the last, and the end that the core told of
    it has been lost, that token is asked for once more, and the end with it.

    Args:
        now: monotonic seconds, as in the stream's metrics.
    """
    sent = stream.sent
    if sent is None:
        return []  # its prompt is still being encoded
    age_s = max(0.0, now - stream.metrics.arrival)
    live = [completion for completion in stream.completions if not completion.is_finished]
    if len(live) == sent.n and not any(_has_begun(c, sent) for c in live):
        # As it was, so that the siblings share the blocks of their prompt from the start.
        return [replace(sent, age_s=age_s, is_replay=True)]
    return [_go_on(completion, sent, stream, age_s) for completion in live]


def _has_begun(completion: Completion, sent: AddRequest) -> bool:
    return completion.num_tokens > len(sent.prior_token_ids)


def _go_on(
    completion: Completion, sent: AddRequest, stream: RequestStream, age_s: float
) -> AddRequest:
    seed = (sent.params.seed + completion.index) & MAX_SEED
    params = replace(sent.params, seed=seed)
    output, ttft_deadline_s = completion.copy_token_ids(), sent.ttft_deadline_s
    if _has_begun(completion, sent):
        ttft_deadline_s = None  # it was in time
        if _may_have_ended(output, params):
            output.pop()
    if any(_has_begun(each, sent) for each in stream.completions):
        # The prompt's scores came before the first token of any of them.
        params = _without_prompt_logprobs(params)
    return replace(
        sent,
        handle=completion.handle,
        n=1,
        params=params,
        prior_token_ids=output,
        age_s=age_s,
        ttft_deadline_s=ttft_deadline_s,
        is_replay=True,
    )


def _may_have_ended(output: list[int], params: TokenParams) -> bool:
    """Whether the newest token was the last one, grammars aside. Why, is the core's to say: there a
    grammar's end is known, which comes before other reasons."""
    num_tokens, min_tokens = len(output), params.min_tokens
    return (
        num_tokens >= params.max_tokens
        or (num_tokens > min_tokens and output[-1] in params.stop_token_ids)
        or (num_tokens >= min_tokens and _is_repetitive(output, params.repetition))
    )


def _is_repetitive(output: list[int], wanted: RepetitionDetection | None) -> bool:
    """By the definition: the core's detector is quicker, but looks at every token."""
    return wanted is not None and any(
        output[-size * wanted.min_count :] == output[-size:] * wanted.min_count
        for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1)
    )


def _without_prompt_logprobs(params: TokenParams) -> TokenParams:
    wanted = params.logprobs
    if wanted is None or (wanted.num_prompt_logprobs is None and not wanted.prompt_token_ids):
        return params
    rest = replace(wanted, num_prompt_logprobs=None, prompt_token_ids=())
    is_empty = rest.num_logprobs is None and not rest.token_ids
    return replace(params, logprobs=None if is_empty else rest)
