"""From what the user asks for to what the engine core acts upon."""

from footplate.protocol.params import SamplingParams
from footplate.protocol.token_params import TokenParams


def resolve_params(
    params: SamplingParams, *, seed: int, max_tokens: int, eos_token_ids: tuple[int, ...]
) -> TokenParams:
    """Fill in what the user left open."""
    own = tuple(params.stop_token_ids or ())
    return TokenParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=own if params.ignore_eos else tuple({*own, *eos_token_ids}),
    )
