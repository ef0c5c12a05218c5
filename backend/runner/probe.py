"""Does this model compute the same through the paged cache as it does by itself?

Asked once per start, because nothing else can tell. Some architectures take no notice of a
registered attention function and go on with their own; some hand their window or chunk to the
mask alone, which a paged step has not; some carry state from token to token beside attention.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from footplate.backend.runner.attention_backend import AttentionBackend, LayerShape
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.errors import one_line
from footplate.backend.runner.paged_model import PagedModel

logger = logging.getLogger(__name__)

MIN_TOKENS = 13
# A window up to this size is probed by a prompt that is longer. A longer prompt would cost a
# large model seconds, so for longer windows it has to do that the layers were told of them.
MAX_TOKENS = 64

# Root mean square of the difference of two rows of logits, relative to that of the row itself.
# Attention to wrong keys gives errors near 1. Rounding gives 2e-6 in float32, and up to 0.06 in
# bfloat16, where a router of experts may also choose differently.
TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.1}
TOLERANCE_ELSE = 1e-3


class NotPagedError(Exception):
    """The paged path does not compute what the model computes; the message says how one sees."""


def probe_paged(
    model: Any,
    backend: AttentionBackend[Any, Any],
    block_size: int,
    windows: set[int],
) -> Mapping[int, LayerShape]:
    """Compare the paged path with the plain model, in the model's own dtype.

    Leaves the model with its own attention implementation. Costs one forward of each path, over
    less than 2 * `MAX_TOKENS` tokens.

    Args:
        windows: sizes of attention windows and chunks that the model's configuration declares
            and that a request may exceed.

    Returns:
        What each layer caches, by layer index.

    Raises:
        NotPagedError: the paths differ, or the paged one fails.
    """
    longest = max([MIN_TOKENS, *(w + 4 for w in windows if w + 4 <= MAX_TOKENS)])
    config = model.config.get_text_config(decoder=True)
    sequences = _sequences(longest, config.vocab_size)
    original = model.config._attn_implementation
    batch, rows = _ragged(sequences, block_size)
    num_blocks = 2 * (longest // block_size + 1)
    try:
        paged = PagedModel(model, backend, num_blocks)
        logits = paged.forward(batch)
    except Exception as error:  # any code of any architecture runs in there
        logger.debug("the paged path failed", exc_info=True)
        raise NotPagedError(f"it fails with {type(error).__name__}: {one_line(error)}") from None
    finally:
        model.set_attn_implementation(original)
    if len(paged.shapes) != config.num_hidden_layers:
        raise NotPagedError(
            f"{len(paged.shapes)} of {config.num_hidden_layers} layers use the attention interface"
        )
    if paged.num_calls != len(paged.shapes):
        # Within one forward it works; the second call overwrites what the first one cached.
        raise NotPagedError("a layer calls attention more than once")
    told = {options.window for options in paged.options.values()} - {None}
    if untold := {window for window in windows if window >= longest} - told:
        raise NotPagedError(f"no layer is told of its window of {min(untold)} tokens")
    # The architecture's own definition. What it uses by default may be an approximation: with
    # `sdpa`, some versions of transformers leave out Gemma 2's soft cap.
    model.set_attn_implementation("eager")
    try:
        expected = _plain_logits(model, sequences, rows)
    finally:
        model.set_attn_implementation(original)
    difference = _largest_error(logits, expected)
    tolerance = tolerance_of(model.dtype)
    if not difference <= tolerance:
        raise NotPagedError(f"logits differ by {difference:.2g} (tolerance {tolerance:.2g})")
    logger.debug("paged attention probed: relative error %.2g", difference)
    return paged.shapes


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative error of logits that rounding in `dtype` explains."""
    return TOLERANCE.get(dtype, TOLERANCE_ELSE)


def _sequences(length: int, vocab_size: int) -> torch.Tensor:
    """Two sequences of different tokens, [2, length], int64."""
    # Spread over the vocabulary; the same on every start.
    return (torch.arange(2 * length) * 7919 + 11).remainder(vocab_size).view(2, length)


def short_batch(vocab_size: int, block_size: int, max_model_len: int) -> tuple[RaggedBatch, int]:
    """A batch as the probe's, of `MIN_TOKENS`; and how many blocks its tables name.

    Its first sequence is told that it stands at the end of the longest possible one: some
    architectures scale their queries by the position, and only far behind does one see it.
    """
    batch, _ = _ragged(_sequences(MIN_TOKENS, vocab_size), block_size)
    first = max(batch.chunks, key=lambda chunk: len(chunk.token_ids))
    row = batch.query_starts[batch.chunks.index(first)]
    batch.positions[row : row + MIN_TOKENS] += max(0, max_model_len - MIN_TOKENS)
    return batch, 1 + max(block for chunk in batch.chunks for block in chunk.block_ids)


def _ragged(sequences: torch.Tensor, block_size: int) -> tuple[RaggedBatch, list[tuple[int, int]]]:
    """A batch that holds everything that can go wrong, and the (sequence, position) of each of
    its rows of logits.

    The second sequence is three tokens shorter and stands there as two chunks and a decode, in
    the wrong order and around the first one. Each layer writes all keys before it reads any, so
    this is legal, and whatever leaks from row to row leaks from the wrong one.
    """
    first, second = sequences.tolist()
    second = second[:-3]
    middle, last = len(second) // 2, len(second) - 1
    num_blocks = len(first) // block_size + 1
    # Every other block: neighbours in a table are no neighbours in memory.
    of_first = [2 * i for i in range(num_blocks)]
    of_second = [2 * i + 1 for i in range(num_blocks)]
    pieces = [(1, middle, last), (0, 0, len(first)), (1, last, len(second)), (1, 0, middle)]
    chunks, wanted, rows = [], [], []
    num_tokens = 0
    for sequence, start, end in pieces:
        tokens = (first, second)[sequence][start:end]
        chunks.append(Chunk(tokens, start, (of_first, of_second)[sequence]))
        for position in sorted({start, (start + end) // 2, end - 1}):
            wanted.append(num_tokens + position - start)
            rows.append((sequence, position))
        num_tokens += end - start
    return RaggedBatch.of_chunks(chunks, wanted, block_size), rows


@torch.inference_mode()
def _plain_logits(model: Any, sequences: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
    """The model's own logits of `rows`, [len(rows), vocab], float32.

    One forward over both sequences at full length: what stands behind a token does not change
    its logits.
    """
    logits = model(input_ids=sequences.to(model.device), use_cache=False).logits
    return torch.stack([logits[sequence, position] for sequence, position in rows]).float()


def _largest_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    # The mean of a row says nothing about its tokens' order; some models have large ones.
    spread = (expected - expected.mean(dim=1, keepdim=True)).pow(2).mean(dim=1).sqrt()
    difference = (logits - expected).pow(2).mean(dim=1).sqrt()
    return float((difference / spread.clamp_min(1e-6)).max())
