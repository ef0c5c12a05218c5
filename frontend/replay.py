"""How a request goes on in another core, behind what its stream has received."""

from msgspec.structs import replace

from footplate.frontend.completion import Completion
from footplate.frontend.stream import RequestStream
from footplate.protocol.bounds import MAX_SEED
from footplate.protocol.messages import AddRequest, AttachRequest
from footplate.protocol.token_params import TokenParams


def continuation(stream: RequestStream, now: float) -> list[AddRequest | AttachRequest]:
    """What to send, so that every completion of this stream that has not ended goes on.

    Nothing but the request and its tokens so far decides what comes next, so it goes on exactly.
    Its clock goes on too. Where the newest token was the last, and the end that the core told of
    it has been lost, the next core tells it.

    Args:
        now: monotonic seconds, as in the stream's metrics.
    """
    sent = stream.sent
    if sent is None:
        return []  # its prompt is still being encoded
    if isinstance(sent, AttachRequest):
        return [sent]  # it has not been answered; another core will say that it knows nothing
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
    ttft_deadline_s = sent.ttft_deadline_s
    if _has_begun(completion, sent):
        ttft_deadline_s = None  # it was in time
    if any(_has_begun(each, sent) for each in stream.completions):
        # The prompt's scores came before the first token of any of them.
        params = _without_prompt_logprobs(params)
    return replace(
        sent,
        handle=completion.handle,
        n=1,
        params=params,
        prior_token_ids=completion.copy_token_ids(),
        age_s=age_s,
        ttft_deadline_s=ttft_deadline_s,
        is_replay=True,
    )


def _without_prompt_logprobs(params: TokenParams) -> TokenParams:
    wanted = params.logprobs
    if wanted is None or (wanted.num_prompt_logprobs is None and not wanted.prompt_token_ids):
        return params
    rest = replace(wanted, num_prompt_logprobs=None, prompt_token_ids=())
    is_empty = rest.num_logprobs is None and not rest.token_ids
    return replace(params, logprobs=None if is_empty else rest)
