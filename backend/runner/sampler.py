"""Logits become tokens: temperature, min_p, top_k, top_p, and one uniform number per token.

The token of a row is a function of that row and of its request: of nothing else in the batch. The
softmax of a row does not depend on the rows beside it (verified in the tests); everything after it
is comparison and integer arithmetic, and therefore exact. Greedy rows cost an argmax and nothing
more.

On CPUs with our own kernels one of them does all of it (sampling.h); elsewhere torch does. Of the
same probabilities both choose the same token. But their softmax rounds differently in the last
bits, and where a border or the noise falls between the two they differ: a few times in 10,000
tokens at most, at a vocabulary of 152k.
"""

from collections.abc import Sequence

import torch

from footplate.backend.kernels.ops import Kernels
from footplate.backend.request import Request
from footplate.backend.runner.noise import uniform
from footplate.backend.runner.torch_sampling import sample_with_torch

# Below this, dividing by the temperature loses the difference between two logits; vLLM's bound.
MIN_TEMPERATURE = 0.01
# As flat as it gets; infinity would turn masked logits into NaN.
MAX_TEMPERATURE = torch.finfo(torch.float32).max


class Sampler:
    """Chooses the next token of each row. Stateless: see `noise`.

    Args:
        kernels: do the work where logits are on the CPU; without them torch does.
    """

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._kernels = kernels

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
        """Choose one token per row.

        Temperature 0 and top_k 1 take the largest logit, the lowest id among equals. Other rows
        are divided by the temperature (at least `MIN_TEMPERATURE`) and cut by min_p, top_k and
        top_p as `cutoff` describes; what is left is sampled by inverse CDF: its tokens share the
        unit interval in the order of their ids, and the row's noise points at one of them.
        Stop tokens are masked before all of this while the request has fewer than min_tokens.

        A row that is no distribution (a NaN or +inf, or nothing but -inf) yields token 0 and
        leaves the other rows alone.

        Args:
            logits: float [num_rows, vocab], on any device. May be overwritten.
            requests: one per row; the token to be sampled is at output position
                `num_output_tokens`.
        """
        assert logits.shape[0] == len(requests), (logits.shape, len(requests))
        if not requests:
            return []
        with torch.inference_mode():
            logits = logits.float()
            _mask_stop_tokens(logits, requests)
            draws = torch.tensor([_draw(request) for request in requests], dtype=torch.float64)
            if self._kernels is not None and logits.device.type == "cpu":
                tokens: list[int] = self._kernels.sample(logits, draws).tolist()
                return tokens
            return sample_with_torch(logits, draws)


def _draw(request: Request) -> tuple[float, float, int, float, float]:
    """What becomes of the request's row: temperature (0 is greedy), min_p, top_k, top_p, noise.
    float64 holds all of them exactly."""
    params = request.params
    if params.temperature == 0 or params.top_k == 1:
        return 0.0, 0.0, 0, 1.0, 0.0
    temperature = min(max(params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    noise = uniform(params.seed, request.num_output_tokens)
    return temperature, params.min_p, params.top_k, params.top_p, noise


def _mask_stop_tokens(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Make the stop tokens of requests that are shorter than their min_tokens impossible."""
    vocab = logits.shape[-1]
    rows: list[int] = []
    ids: list[int] = []
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens:
            # An id beyond the vocabulary cannot be sampled, and must not end the step.
            stops = [token for token in request.params.stop_token_ids if token < vocab]
            rows += [row] * len(stops)
            ids += stops
    if rows:
        logits[rows, ids] = -torch.inf
