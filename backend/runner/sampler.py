"""Logits become tokens: temperature, min_p, top_k, top_p, and one uniform number per token.

The token of a row is a function of that row and of its request: of nothing else in the batch.
The softmax of a row is torch's and does not depend on the rows beside it (verified in the
tests); everything after it is comparison and integer arithmetic, and therefore exact. Greedy rows
cost an argmax and nothing more.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from footplate.backend.request import Request
from footplate.backend.runner.cutoff import drop_below, find_cutoff, weigh
from footplate.backend.runner.noise import uniform
from footplate.protocol.params import TokenParams

# Below this, dividing by the temperature loses the difference between two logits; vLLM's bound.
MIN_TEMPERATURE = 0.01

# Elements of logits worked on at once: what comes between logits and token (30 bytes an
# element) stays in the cache, and allocations stay small enough for malloc to reuse them.
# Fresh pages for 32 rows of 152k tokens cost more than all of the arithmetic on them.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ELSEWHERE = 2**26


class Sampler:
    """Chooses the next token of each row. Stateless: see `noise`."""

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
        tokens = [0] * len(requests)
        with torch.inference_mode():
            logits = logits.float()
            _mask_stop_tokens(logits, requests)
            for rows in _groups(requests, logits.shape[-1], logits.device.type):
                block = _take(logits, rows)
                params = [requests[row].params for row in rows]
                if _is_greedy(params[0]):
                    chosen = _argmax(block)
                else:
                    chosen = _draw(block, params, [_noise(requests[row]) for row in rows])
                for row, token in zip(rows, chosen, strict=True):
                    tokens[row] = token
        return tokens


def _is_greedy(params: TokenParams) -> bool:
    return params.temperature == 0 or params.top_k == 1


def _groups(requests: Sequence[Request], vocab: int, device: str) -> Iterator[list[int]]:
    """Split the rows into blocks that cost the same: greedy; not cut by rank; cut by top_k, so
    that few tokens are left; cut by top_p alone."""
    greedy, uncut, by_count, by_mass = [], [], [], []
    for row, request in enumerate(requests):
        params = request.params
        if _is_greedy(params):
            greedy.append(row)
        elif params.top_k > 0:
            by_count.append(row)
        elif params.top_p < 1:
            by_mass.append(row)
        else:
            uncut.append(row)
    if greedy:
        yield greedy
    size = max(1, _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSEWHERE) // vocab)
    for rows in (uncut, by_count, by_mass):
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _noise(request: Request) -> float:
    return uniform(request.params.seed, request.num_output_tokens)


def _take(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The rows, as a view where they are neighbours. Rows ascend."""
    first, last = rows[0], rows[-1]
    return logits[first : last + 1] if last - first == len(rows) - 1 else logits[rows]


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


def _argmax(logits: torch.Tensor) -> Iterable[int]:
    if logits.device.type == "cpu":
        # numpy's is vectorised, torch's is not: 0.3 ms against 2.6 for 32 rows of 152k tokens.
        best = torch.from_numpy(logits.numpy().argmax(-1))
    else:
        best = logits.argmax(-1)
    finite = logits.gather(-1, best[:, None]).squeeze(-1).isfinite()
    return (best * finite).tolist()


def _draw(
    logits: torch.Tensor, params: Sequence[TokenParams], noise: Sequence[float]
) -> Iterable[int]:
    """Sample each row [num_rows, vocab] by its parameters and its noise in [0, 1)."""
    # One upload for all. float64 holds top_k and the noise exactly.
    table = [
        (_temperature(own), own.min_p, own.top_k, own.top_p, u)
        for own, u in zip(params, noise, strict=True)
    ]
    columns = torch.tensor(table, dtype=torch.float64)[..., None].to(logits.device)
    temperature, min_p, top_k, top_p, point = columns.unbind(1)  # each [num_rows, 1]
    probs = torch.softmax(logits / temperature.float(), -1)
    # Softmax spreads what is no number over its whole row, and not beyond it.
    broken = probs[:, :1].isnan()
    if bool(broken.any()):
        probs.nan_to_num_(0.0)
        probs[:, :1] += broken
    if any(own.min_p > 0 or own.top_k > 0 or own.top_p < 1 for own in params):
        probs = drop_below(probs, find_cutoff(probs, min_p.float(), top_k.long(), top_p))
    cdf = weigh(probs).cumsum(-1)
    total = cdf[:, -1:]
    # The product is rounded to float64 and may reach the total, where there is no token.
    target = torch.minimum((point * total).long(), total - 1)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).tolist()


def _temperature(params: TokenParams) -> float:
    # The largest float32 is as flat as it gets; infinity would turn masked logits into NaN.
    return min(max(params.temperature, MIN_TEMPERATURE), torch.finfo(torch.float32).max)
