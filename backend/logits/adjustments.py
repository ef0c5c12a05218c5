"""What a request does to its logits, in order.

The order is vLLM's: allowed tokens, bad words, min_tokens, logit_bias, custom processors, and
penalties, and then the thinking budget. Last comes the grammar's mask, which nothing before it can
break; `LogitRows` applies it, because there a row may be left for the few tokens that are allowed.
Where the grammar leaves no other choice it also wins over min_tokens and over the thinking budget.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from footplate.backend.cause import describe_cause
from footplate.backend.logits.bad_words import BadWords
from footplate.backend.logits.errors import RowFailed
from footplate.backend.logits.penalties import Penalties
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.thinking import ThinkingState
from footplate.backend.logits.token_set import TokenSet
from footplate.backend.request import Request
from footplate.backend.termination import Terminated
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import LogitAdjustments, ProcessorCall

FloatRow = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

Result = TypeVar("Result")

NOTHING = LogitAdjustments()


class AdjustedRequest:
    """Owns what is remembered of one request from row to row. All of it follows from the request's
    tokens and parameters, so it can be dropped and made again at any time.

    Args:
        vocab_size: length of a row. Ids beyond it are ignored, whoever names them.
        processors: those that the engine was started with.

    Raises:
        RowFailed: a custom processor refuses its arguments, or does not exist.
    """

    def __init__(
        self, request: Request, vocab_size: int, processors: Sequence[type[LogitsProcessor]]
    ) -> None:
        self.request = request
        self.num_tokens = 0  # of the request, taken so far
        self._vocab_size = vocab_size
        own = request.params.adjustments or NOTHING
        self._stop_ids = self._existing(set(request.params.stop_token_ids))
        self._allowed = None
        if own.allowed_token_ids is not None:
            self._allowed = self._existing(own.allowed_token_ids)
        self._bad_words = BadWords(own.bad_words, vocab_size) if own.bad_words else None
        bias = {i: value for i, value in own.logit_bias.items() if i < vocab_size}
        self._biased_ids = np.array(list(bias), np.intp)
        self._biases = np.array(list(bias.values()), np.float64)
        self._penalties = Penalties(own, vocab_size) if Penalties.are_wanted(own) else None
        self._thinking = ThinkingState(own.thinking) if own.thinking else None
        prompt = tuple(request.token_ids[: request.num_prompt_tokens])
        self._processors = [
            (name, make(prompt, vocab_size))
            for name, make in (_find_processor(call, processors) for call in own.processors)
        ]

    def _existing(self, token_ids: Sequence[int] | set[int]) -> Ids:
        return np.array([i for i in token_ids if i < self._vocab_size], np.intp)

    def adjust(self, row: FloatRow, grammar: TokenSet | None) -> None:
        """Change the row of the request's next token in place, but for the grammar's mask.

        Args:
            row: float32 [vocab].
            grammar: which tokens the request's grammar allows, for what gives way to it; None is
                all.

        Raises:
            RowFailed: a processor failed, or the budget's end is no token of this model.
        """
        self._catch_up()
        if self._allowed is not None:
            logits = row[self._allowed]
            row.fill(-np.inf)
            row[self._allowed] = logits
        if self._bad_words is not None:
            request = self.request
            row[self._bad_words.completing(request.token_ids, request.num_prompt_tokens)] = -np.inf
        if self._must_go_on(grammar):
            row[self._stop_ids] = -np.inf
        # What becomes too large is found when a token is to be drawn.
        if len(self._biased_ids) or self._processors or self._penalties is not None:
            with np.errstate(all="ignore"):
                self._compute(row)
        if self._thinking is not None:
            self._end_thinking(self._thinking.forced, row, grammar)

    def _compute(self, row: FloatRow) -> None:
        if len(self._biased_ids):
            row[self._biased_ids] = row[self._biased_ids] + self._biases
        for name, process in self._processors:
            self._run(name, process, row)
        if self._penalties is not None:
            self._penalties.apply(row)

    def _catch_up(self) -> None:
        """Take the tokens that have come since the row before."""
        request = self.request
        token_ids, start = request.token_ids, request.num_prompt_tokens
        new_prompt = token_ids[self.num_tokens : start]
        new_output = token_ids[max(self.num_tokens, start) :]
        self.num_tokens = len(token_ids)
        if self._penalties is not None:
            self._penalties.add_prompt(new_prompt)
            self._penalties.add_output(new_output)
        if self._thinking is not None:
            self._thinking.add(new_prompt)
            self._thinking.add(new_output)

    def _must_go_on(self, grammar: TokenSet | None) -> bool:
        """Whether stop tokens are impossible: before min_tokens, unless the grammar allows
        nothing else."""
        if self.request.num_output_tokens >= self.request.params.min_tokens:
            return False
        return grammar is None or grammar.num_tokens > grammar.count(self._stop_ids)

    def _run(self, name: str, process: LogitsProcessor, row: FloatRow) -> None:
        if not _is_distribution(row):
            raise RowFailed(
                ErrorKind.LOGITS,
                f"no distribution before {name}: a NaN or infinity",
                is_corrupted=True,
            )
        output = self.request.token_ids[self.request.num_prompt_tokens :]
        # A view: whatever else becomes of the array, the row stays as long as the vocabulary.
        returned = _guarded(name, lambda: process(output, row[:]))
        if returned is not None:
            raise RowFailed(
                ErrorKind.PROCESSOR,
                f"{name} returned a {type(returned).__name__}: it must change the logits in place, "
                "and return nothing",
            )
        if not _is_distribution(row):
            raise RowFailed(ErrorKind.PROCESSOR, f"{name} left a NaN or infinity in the logits")

    def _end_thinking(self, token_id: int | None, row: FloatRow, grammar: TokenSet | None) -> None:
        if token_id is None:
            return
        if token_id >= self._vocab_size:
            raise RowFailed(
                ErrorKind.INVALID,
                f"the end of thinking has token {token_id}: ids are 0 to {self._vocab_size - 1}",
            )
        if grammar is None or grammar.ceiling[token_id] > 0:
            if not _is_distribution(row):
                raise RowFailed(
                    ErrorKind.LOGITS,
                    "no distribution at the end of thinking: a NaN or infinity",
                    is_corrupted=True,
                )
            row.fill(-np.inf)
            row[token_id] = 0.0

    def name_changes(self) -> str:
        """What may have spoiled the row, for an error message."""
        changes = {
            "allowed_token_ids": self._allowed is not None,
            "bad_words": self._bad_words is not None,
            "min_tokens": self._must_go_on(None),
            "logit_bias": len(self._biased_ids) > 0,
            "logits_processors": bool(self._processors),
            "penalties": self._penalties is not None,
            "the grammar": self.request.grammar is not None,
        }
        return ", ".join(name for name, is_there in changes.items() if is_there)


def _is_distribution(row: FloatRow) -> bool:
    # The largest is NaN if any is. Nothing but -infinity is the masks' work, and found later.
    return bool(row.max() < np.inf)


def _find_processor(
    call: ProcessorCall, processors: Sequence[type[LogitsProcessor]]
) -> tuple[str, Callable[[Sequence[int], int], LogitsProcessor]]:
    """The processor's name, and what makes one for a prompt and a size of vocabulary."""
    if call.index >= len(processors):
        raise RowFailed(
            ErrorKind.PROCESSOR,
            f"there is no logits processor {call.index}: this engine has {len(processors)}",
        )
    kind = processors[call.index]
    name = f"logits processor {kind.__name__}"

    def make(prompt: Sequence[int], vocab_size: int) -> LogitsProcessor:
        # A copy: siblings have the same ones, and so has whoever goes on after a preemption.
        arguments = _guarded(name, lambda: copy.deepcopy(call.arguments))  # may be nested too deep
        if hasattr(kind, "check_arguments"):
            _guarded(name, lambda: kind.check_arguments(arguments))
        return _guarded(name, lambda: kind(arguments, prompt, vocab_size))

    return name, make


def _guarded(name: str, run: Callable[[], Result]) -> Result:
    """Run code that is not ours: whatever it raises is the request's end, and no more."""
    try:
        return run()
    except Terminated:
        raise
    except BaseException as error:  # sys.exit() and the like would end everybody else's request
        raise RowFailed(ErrorKind.PROCESSOR, f"{name}: {describe_cause(error)}") from error
