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

from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from footplate.backend.kernels.ops import Kernels
from footplate.backend.logits.logprobs import log_sum_exp
from footplate.backend.logits.processed import effective_temperature
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.rows import NO_DISTRIBUTION, LogitRows
from footplate.backend.logits.wanted import is_special
from footplate.backend.request import Request
from footplate.backend.runner.noise import uniform
from footplate.backend.runner.torch_sampling import sample_with_torch
from footplate.backend.step import ScoredRows, StepResult

# Devices whose rows numpy works on where they are. From others, special rows travel to the host and
# back. That costs more than a kernel for each parameter would, but each of them has one definition,
# and the same bits on every device.
IN_PLACE = frozenset({"cpu"})


SKIP = (-1.0, 0.0, 0.0, 1.0, 0.0)  # what becomes of a row that is not to be looked at


class Sampler:
    """Chooses the next token of each row. The draw itself is stateless: see `noise`. What requests
    ask for beside it is in `LogitRows`.

    Args:
        kernels: do the work where logits are on the CPU; without them torch does.
        processors: custom logits processors, see `LogitRows`.
    """

    def __init__(
        self, kernels: Kernels | None = None, processors: Sequence[type[LogitsProcessor]] = ()
    ) -> None:
        self._kernels = kernels
        self._rows = LogitRows(processors, kernels.log_sum_exp if kernels else log_sum_exp)

    def prepare(self, requests: Sequence[Request], vocab_size: int) -> None:
        """Begin what can be done beside the forward pass: call it before that, with the requests
        that `sample` will get."""
        if constrained := [request for request in requests if request.grammar is not None]:
            self._rows.prepare(constrained, vocab_size)

    def forget(self, keys: Iterable[int]) -> None:
        """Drop what is held for requests of these keys, if anything is."""
        self._rows.forget(keys)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> StepResult:
        """Choose one token per row.

        First a row is changed as its request asks for (see `adjustments`). Temperature 0 and top_k
        1 then take the largest logit, the lowest id among equals. Other rows are divided by the
        temperature (at least `MIN_TEMPERATURE`) and cut by min_p, top_k and top_p as `cutoff`
        describes; what is left is sampled by inverse CDF: its tokens share the unit interval in
        the order of their ids, and the row's noise points at one of them.

        A row that is no distribution (a NaN or +inf, or nothing but -inf) becomes an error and
        leaves the other rows alone.

        Args:
            logits: float [num_rows, vocab], on any device. May be overwritten.
            requests: one per row; the token to be sampled is at output position
                `num_output_tokens`.

        Returns:
            All but prompt logprobs; indices are into `requests`.
        """
        assert logits.shape[0] == len(requests), (logits.shape, len(requests))
        if not requests:
            return StepResult()
        with torch.inference_mode():
            logits = logits.float()
            special = [row for row, request in enumerate(requests) if is_special(request)]
            if not special:
                return _with_errors(StepResult(self._draw(logits, requests)))
            on_host = logits.device.type in IN_PLACE
            rows = logits if on_host else logits[special].cpu()
            on_rows = rows.numpy()
            edited = [
                self._rows.edit(
                    requests[row], on_rows[row if on_host else place], may_narrow=on_host
                )
                for place, row in enumerate(special)
            ]
            if not on_host:
                logits[special] = rows.to(logits.device)
            narrow = {
                row: edits.narrow
                for row, edits in zip(special, edited, strict=True)
                if edits.narrow is not None
            }
            result = StepResult(self._draw(logits, requests, skipped=narrow))
            if narrow:
                self._draw_narrow(on_rows, requests, narrow, result.token_ids)
        for row, edits in zip(special, edited, strict=True):
            self._rows.settle(edits, row, result)
        going_on = [
            requests[row]
            for row in special
            if requests[row].grammar is not None and row not in result.complete
        ]
        if going_on:
            self._rows.prepare_ahead(going_on, logits.shape[1])
        return _with_errors(result)

    def score_prompt(self, logits: torch.Tensor, request: Request, positions: range) -> ScoredRows:
        """Score prompt tokens, see `LogitRows.score_prompt`.

        Args:
            logits: float [len(positions), vocab], on any device.
        """
        return self._rows.score_prompt(logits.float().cpu().numpy(), request, positions)

    def _draw_narrow(
        self,
        rows: npt.NDArray[np.float32],
        requests: Sequence[Request],
        narrow: Mapping[int, npt.NDArray[np.intp]],
        token_ids: list[int],
    ) -> None:
        """Draw the tokens of some rows among a few ids each, which ascend as in a whole row."""
        width = max(map(len, narrow.values()))
        logits = np.full((len(narrow), width), -np.inf, np.float32)
        for place, (row, ids) in enumerate(narrow.items()):
            logits[place, : len(ids)] = rows[row, ids]
        drawn = self._draw(torch.from_numpy(logits), [requests[row] for row in narrow])
        for place, (row, ids) in zip(drawn, narrow.items(), strict=True):
            token_ids[row] = int(ids[place]) if place >= 0 else -1

    def _draw(
        self, logits: torch.Tensor, requests: Sequence[Request], skipped: Container[int] = ()
    ) -> list[int]:
        """One token per row of float32 logits; -1 where a row is no distribution, or skipped."""
        draws = torch.tensor(
            [SKIP if row in skipped else _draw_of(request) for row, request in enumerate(requests)],
            dtype=torch.float64,
        )
        if self._kernels is not None and logits.device.type == "cpu":
            tokens: list[int] = self._kernels.sample(logits, draws).tolist()
            return tokens
        return sample_with_torch(logits, draws)


def _with_errors(result: StepResult) -> StepResult:
    """Rows that are no distribution though a token is wanted, and have no error that says more."""
    if min(result.token_ids) < 0:
        for index, token_id in enumerate(result.token_ids):
            if token_id < 0 and index not in result.already_complete:
                result.errors.setdefault(index, NO_DISTRIBUTION)
    return result


def _draw_of(request: Request) -> tuple[float, float, int, float, float]:
    """What becomes of the request's row: temperature (0 is greedy), min_p, top_k, top_p, noise.
    float64 holds all of them exactly."""
    params = request.params
    if params.temperature == 0 or params.top_k == 1:
        return 0.0, 0.0, 0, 1.0, 0.0
    noise = uniform(params.seed, request.num_output_tokens)
    temperature = effective_temperature(params.temperature)
    return temperature, params.min_p, params.top_k, params.top_p, noise
