"""A model without weights: the next token is a pure function of the prefix.

For load, fault and simulation tests: it needs no torch, costs microseconds, and whoever knows a
prompt can compute what every stream must contain. Requests that change logits or ask for logprobs
get logits to that token (`fake_rows`), and need numpy.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.logits.wanted import max_scored_rows, prompt_positions
from footplate.backend.request import Request
from footplate.backend.step import RowError, RunnerFacts, StepPlan, StepResult
from footplate.protocol.config import CacheConfig, ModelConfig
from footplate.protocol.messages import ErrorKind, ModelFacts
from footplate.protocol.token_params import TokenParams

if TYPE_CHECKING:
    from footplate.backend.runner.fake_rows import FakeRows

DEFAULT_MAX_MODEL_LEN = 32_768
DEFAULT_NUM_BLOCKS = 65_536
BYTES_PER_TOKEN = 1024  # what a cached token is said to cost, for kv_cache_memory_bytes


def digest_prefix(token_ids: Sequence[int], so_far: int = 0) -> int:
    """CRC-32 of token ids as 32-bit words; `so_far` continues the digest of a prefix."""
    return zlib.crc32(array("I", token_ids).tobytes(), so_far)


def next_token(
    digest: int, position: int, params: TokenParams, vocab_size: int, first_id: int = 0
) -> int:
    """The token at output `position` behind a prefix of this digest.

    Greedy requests get a function of the prefix alone, others of prefix and seed.

    Args:
        first_id: ids below it are never produced (special tokens).
    """
    if params.temperature > 0:
        digest = zlib.crc32(params.seed.to_bytes(8, "little"), digest)
    # The low bits of a CRC of similar inputs are similar; a multiplication spreads them.
    span = vocab_size - first_id
    token = first_id + ((digest * 0x9E3779B1) >> 7) % span
    if position < params.min_tokens:
        # Bounded, for a request that stops at every token there is.
        for _ in range(span):
            if token not in params.stop_token_ids:
                break
            token = first_id + (token - first_id + 1) % span
    return token


class FakeModelRunner:
    """A `ModelRunner` over `next_token`. Owns one digest per running request.

    Args:
        tokenizer: a folder with a config.json that says how large its vocabulary is.
        processors: custom logits processors that requests may use.
    """

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig,
        tokenizer: Path,
        processors: Sequence[type[LogitsProcessor]] = (),
    ) -> None:
        config = json.loads((tokenizer / "config.json").read_text())
        num_blocks = cache.num_gpu_blocks_override or DEFAULT_NUM_BLOCKS
        if cache.num_gpu_blocks_override is None and cache.kv_cache_memory_bytes is not None:
            num_blocks = cache.kv_cache_memory_bytes // (cache.block_size * BYTES_PER_TOKEN)
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache_memory_bytes={cache.kv_cache_memory_bytes} holds no KV block: a block "
                f"of {cache.block_size} tokens takes {cache.block_size * BYTES_PER_TOKEN} bytes"
            )
        capacity = num_blocks * cache.block_size
        max_model_len = model.max_model_len or min(DEFAULT_MAX_MODEL_LEN, capacity)
        if max_model_len > capacity:
            raise ValueError(
                f"max_model_len={max_model_len} does not fit into {num_blocks} KV blocks of "
                f"{cache.block_size} tokens: lower max_model_len or give more blocks"
            )
        self._vocab_size = int(config["vocab_size"])
        # Tokenizers of byte-level BPE begin with their special tokens.
        self._first_id = 16
        self._digests: dict[int, tuple[int, int]] = {}
        self._processors = processors
        self._rows: FakeRows | None = None  # once somebody needs it
        self.facts = RunnerFacts(
            model=ModelFacts(
                model="fake",
                tokenizer=model.tokenizer or str(tokenizer),
                architecture="Fake",
                vocab_size=self._vocab_size,
                max_model_len=max_model_len,
                eos_token_ids=(),
                dtype="none",
                device="cpu",
                attention="none",
            ),
            num_kv_blocks=num_blocks,
            supports_prefix_caching=True,
            max_scored_rows=max_scored_rows(self._vocab_size),
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Produce a token for every sampling request; prompts cost nothing."""
        for key in plan.released:
            self._digests.pop(key, None)
        if self._rows is not None:
            self._rows.forget(plan.released)
        result = StepResult([self._sample(plan.requests[index]) for index in plan.sampling])
        special = [
            place
            for place, request in enumerate(plan.requests)
            # Of min_tokens alone `next_token` knows.
            if (params := request.params).adjustments is not None
            or params.logprobs is not None
            or request.grammar is not None
        ]
        for place in special:
            request = plan.requests[place]
            if place in plan.sampling:
                self._choose(request, plan.sampling.index(place), result)
            self._score_prompt(request, place, plan.num_new_tokens[place], result)
        return result

    def _sample(self, request: Request) -> int:
        token_ids = request.token_ids
        length, digest = self._digests.get(request.key, (0, 0))
        digest = digest_prefix(token_ids[length:], digest)
        self._digests[request.key] = (len(token_ids), digest)
        position = len(token_ids) - request.num_prompt_tokens
        return next_token(digest, position, request.params, self._vocab_size, self._first_id)

    def _choose(self, request: Request, index: int, result: StepResult) -> None:
        """Replace the token at `index` by what the request makes of the logits."""
        rows = self._load_rows()
        if rows is None:
            result.errors[index] = RowError(
                ErrorKind.INVALID,
                "logprobs, grammars and changes of logits need the package 'numpy' in the engine "
                "core: pip install 'footplate-llm[engine]'",
            )
            return
        rows.choose(request, self._digests[request.key][1], index, result)

    def _score_prompt(self, request: Request, place: int, count: int, result: StepResult) -> None:
        start = request.num_computed_tokens
        positions = prompt_positions(request, start, start + count)
        # Without numpy, the request fails when it samples.
        if positions and (rows := self._load_rows()) is not None:
            result.prompt_logprobs[place] = rows.score_prompt(request, positions)

    def _load_rows(self) -> FakeRows | None:
        """None where numpy is missing."""
        if self._rows is None:
            try:
                from footplate.backend.runner.fake_rows import FakeRows
            except ModuleNotFoundError:
                return None
            self._rows = FakeRows(self._processors, self._vocab_size, self._first_id)
        return self._rows
