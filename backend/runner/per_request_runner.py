"""The runner for models that our paged cache cannot serve: one transformers cache per request,
one forward per request. Slower, and right for whatever transformers can generate with.

Attention that does not go through the library's interface, recurrent and convolutional state,
chunked attention: all of it lives in a cache object that only the model understands.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from footplate.backend.logits.wanted import prompt_positions
from footplate.backend.request import Request
from footplate.backend.runner.sampler import Sampler
from footplate.backend.step import RunnerFacts, StepPlan, StepResult

logger = logging.getLogger(__name__)

# Recurrent families name their cache differently.
CACHE_NAMES = ("past_key_values", "cache_params")
# Layers that put new tensors in the place of theirs, and change none.
REPLACING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class CacheError(Exception):
    """A model cannot be continued token by token."""


class CachedModel:
    """A model with its own cache: the state after a prefix goes in, the state after more comes
    out."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        names = [name for name in CACHE_NAMES if name in parameters]
        if not names:
            raise CacheError(f"{type(model).__name__} takes no cache")
        self._cache_name = names[0]
        self._keeps_logits = "logits_to_keep" in parameters

    @torch.inference_mode()
    def forward(
        self, token_ids: list[int], cache: Any, num_rows: int = 1
    ) -> tuple[torch.Tensor, Any]:
        """Continue one sequence.

        Args:
            token_ids: the tokens behind those that are in `cache`.
            cache: what an earlier call returned, or None at the start of a sequence. Changed in
                place, so it must not be used again.
            num_rows: how many of the last tokens' logits are wanted.

        Returns:
            Logits behind each of the last tokens, [num_rows, vocab] float32, and the cache for the
            next call.
        """
        inputs = torch.tensor([token_ids], device=self._model.device)
        options: dict[str, Any] = {} if cache is None else {self._cache_name: cache}
        if self._keeps_logits:
            options["logits_to_keep"] = num_rows
        # The model makes its own cache, of the class that suits it, and derives positions from
        # what is in there.
        output = self._model(input_ids=inputs, use_cache=True, **options)
        cache = getattr(output, self._cache_name, None)
        if cache is None:
            raise CacheError(f"{type(self._model).__name__} returns no cache")
        return output.logits[0, -num_rows:].float(), cache

    def remember(self, cache: Any) -> Callable[[], None] | None:
        """What takes a cache back to how it is now, if the next forward raises half-way; None for
        caches that are changed in place."""
        if type(cache) is not DynamicCache:
            return None
        layers = list(cache.layers)
        if not all(type(layer) in REPLACING_LAYERS for layer in layers):
            return None
        contents = [vars(layer).copy() for layer in layers]

        def take_back() -> None:
            cache.layers[:] = layers
            for layer, content in zip(layers, contents, strict=True):
                vars(layer).clear()
                vars(layer).update(content)

        return take_back

    def measure_bytes_per_token(self) -> int:
        """What the cache of one sequence grows by with every token; 0 for recurrent state."""
        short, long = (self.forward([0] * n, None)[1] for n in (4, 12))
        return max(0, _num_bytes(long) - _num_bytes(short)) // 8


def _num_bytes(cache: Any) -> int:
    tensors = [
        value
        for layer in getattr(cache, "layers", ())
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Logits of one request that nothing has been made of yet.

    Attributes:
        chunk: the tokens that they were wanted for, by position.
        scored: prompt positions that the first of them score.
        logits: [len(scored) + 1, vocab], or [1, vocab].
    """

    chunk: range
    scored: range
    logits: torch.Tensor


class PerRequestRunner:
    """A `ModelRunner` that owns one model cache per running request, by `Request.key`.

    A cache only goes forward, so a forward is not simply done again when its step is: rows of a
    step that raised are kept until a step has made something of them, and a cache whose forward
    raised is taken back, or made anew from the start where it cannot be.

    Where prompts are computed in one forward, their logits are scored in one step too, as many as
    there are: `max_scored_rows` holds for chunks.

    Args:
        prefill_in_chunks: False where a prompt must be computed in one forward; then its chunks
            are collected until the last of them is due.
    """

    def __init__(
        self, model: CachedModel, facts: RunnerFacts, sampler: Sampler, prefill_in_chunks: bool
    ) -> None:
        self.facts = facts
        self._model = model
        self._prefill_in_chunks = prefill_in_chunks
        self._sampler = sampler
        # By request key: how many tokens are in the cache, and the cache.
        self._states: dict[int, tuple[int, Any]] = {}
        self._rows: dict[int, _Rows] = {}  # likewise

    def execute(self, plan: StepPlan) -> StepResult:
        """See `ModelRunner`."""
        for key in plan.released:
            self._states.pop(key, None)
            self._rows.pop(key, None)
        self._sampler.forget(plan.released)
        requests = [plan.requests[i] for i in plan.sampling]
        self._sampler.prepare(requests, self.facts.model.vocab_size)
        sampling = set(plan.sampling)
        last_rows = []
        prompt_logprobs = {}
        for index, (request, count) in enumerate(
            zip(plan.requests, plan.num_new_tokens, strict=True)
        ):
            is_last = index in sampling
            if not (is_last or self._prefill_in_chunks):
                continue
            rows = self._compute(request, count)
            if rows.scored:
                prompt_logprobs[index] = self._sampler.score_prompt(
                    rows.logits[: len(rows.scored)], request, rows.scored
                )
            if is_last:
                last_rows.append(rows.logits[-1])
        result = (
            self._sampler.sample(torch.stack(last_rows), requests) if requests else StepResult()
        )
        result.prompt_logprobs = prompt_logprobs
        for request in plan.requests:
            self._rows.pop(request.key, None)
        return result

    def _compute(self, request: Request, count: int) -> _Rows:
        """The rows of a request's next `count` tokens, of a step that raised or of a forward."""
        key, start = request.key, request.num_computed_tokens
        chunk = range(start, start + count)
        rows = self._rows.get(key)
        if rows is None or rows.chunk != chunk:
            # A state of another length is of no use: the request was preempted, or its chunks
            # were collected, or a step was run again. From the start then; it costs time only.
            length, cache = self._states.pop(key, (0, None))
            if length != start:
                start, cache = 0, None
            scored = prompt_positions(request, start, chunk.stop)
            num_rows = chunk.stop - scored.start + 1 if scored else 1
            token_ids = request.token_ids[start : chunk.stop]
            take_back = self._model.remember(cache)
            try:
                logits, state = self._model.forward(token_ids, cache, num_rows)
            except Exception:
                if take_back is not None:
                    take_back()
                    self._states[key] = (start, cache)
                raise
            self._states[key] = (chunk.stop, state)
            rows = self._rows[key] = _Rows(chunk, scored, logits)
        return rows


def probe_chunks(model: Any, cached: CachedModel, tolerance: float) -> bool:
    """Whether prompts may be computed in chunks; decoding must work in any case.

    Raises:
        CacheError: the model's cache does not continue a sequence: what comes out differs from
            one forward over the whole of it.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = [(i * 7919 + 11) % vocab_size for i in range(12)]
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    expected = plain.logits[0, -1:].float()

    def error_of(*lengths: int) -> float:
        start, cache = 0, None
        for length in lengths:
            logits, cache = cached.forward(tokens[start : start + length], cache)
            start += length
        spread = (expected - expected.mean()).norm().clamp_min(1e-6)
        return float((logits - expected).norm() / spread)

    if error_of(4, 7, 1) <= tolerance:
        return True
    error = error_of(11, 1)
    if not error <= tolerance:
        raise CacheError(f"its own cache changes its logits by {error:.2g}")
    logger.info("prompts are computed in one forward: chunks of them change the logits")
    return False
