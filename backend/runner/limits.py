"""What a model's configuration says about lengths and ends, whatever the architecture calls it."""

from dataclasses import dataclass
from typing import Any

# The names of one thing, in the order of how many architectures use them.
LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "n_ctx",
)
# For models without any limit of their own (recurrent ones, ALiBi).
DEFAULT_LENGTH = 8192
# Lengths from which on some layer no longer sees every token before it.
WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "index_topk", "compress_rates")


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """How long a sequence may be.

    Attributes:
        hard: the model cannot go beyond.
        paged: beyond it, the model computes a sequence differently as a whole, so that requests
            of different lengths cannot share a forward. Never more than `hard`.
    """

    hard: int
    paged: int


def length_limits(config: Any) -> LengthLimits:
    """Read them from a transformers configuration."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in LENGTH_NAMES]
    hard = next((n for n in found if isinstance(n, int) and n > 0), DEFAULT_LENGTH)
    # LongRoPE (Ding et al. 2024) has two sets of rotary frequencies, and transformers chooses
    # one for all tokens of a forward by the largest position among them.
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        return LengthLimits(hard, min(hard, original or hard))
    return LengthLimits(hard, hard)


def attention_windows(config: Any, max_model_len: int) -> set[int]:
    """Sizes of windows and chunks that a sequence of `max_model_len` tokens would exceed."""
    text = config.get_text_config(decoder=True)
    found: list[Any] = []
    for name in WINDOW_NAMES:
        value = getattr(text, name, None)
        found += value.values() if isinstance(value, dict) else [value]
    return {n for n in found if isinstance(n, int) and 0 < n < max_model_len}


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """All end-of-sequence tokens that the generation configuration or the model's own names."""
    config = model.config
    found: set[int] = set()
    for source in (model.generation_config, config, config.get_text_config(decoder=True)):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))
