"""What a request asks for, in a few attribute checks: plain requests pay no more, and need no
numpy."""

from footplate.backend.request import Request
from footplate.protocol.token_params import LogprobsRequest

# Logits of prompt tokens that one request may have in one step.
MAX_SCORED_BYTES = 64 * 2**20


def is_special(request: Request) -> bool:
    """Whether the request's next row is more than a distribution to draw from."""
    params = request.params
    return (
        params.adjustments is not None
        or (params.logprobs is not None and output_logprobs(request) is not None)
        or request.grammar is not None
        or (params.min_tokens > 0 and request.num_output_tokens < params.min_tokens)
    )


def output_logprobs(request: Request) -> LogprobsRequest | None:
    """What is to be told of sampled tokens, if anything is."""
    wanted = request.params.logprobs
    if wanted is None or (wanted.num_logprobs is None and not wanted.token_ids):
        return None
    return wanted


def wants_prompt_logprobs(request: Request) -> bool:
    """Whether positions of its prompt are scored at all."""
    wanted = request.params.logprobs
    return wanted is not None and bool(
        wanted.num_prompt_logprobs is not None or wanted.prompt_token_ids
    )


def prompt_positions(request: Request, start: int, end: int) -> range:
    """The prompt positions whose tokens are to be scored when tokens `start` to `end` - 1 are
    computed: each by the row of the token before it.

    Behind the prompt may be output of an earlier life of the request: that is not scored.
    """
    wanted = request.params.logprobs
    if wanted is None or not wants_prompt_logprobs(request):
        return range(0)
    first = max(1, start + 1, wanted.prompt_start, request.num_scored)
    return range(first, min(end + 1, request.num_prompt_tokens))


def max_scored_rows(vocab_size: int) -> int:
    """`RunnerFacts.max_scored_rows` of a model whose rows are float32."""
    return max(1, MAX_SCORED_BYTES // (4 * vocab_size))
