#!/usr/bin/env python3
"""Make a model of a known shape with random weights: the same speed, nothing to download.

Prints the folder, which is made once and kept in the user's cache. It holds a config and weights,
and a tokenizer if one is asked for; without it, prompts are token ids. The weights are spread so
that greedy decoding wanders through the vocabulary as a trained model's does, where the usual
initialisation would repeat one token, with near-ties everywhere.

    scripts/random_model.py llama-160m
    scripts/random_model.py qwen3-0.6b --dtype float32
    scripts/random_model.py llama-160m --tokenizer
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import App
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from random_tokenizer import EOS_TOKEN_ID, save_tokenizer

Shape = Literal["llama-tiny", "llama-160m", "qwen3-0.6b"]
Dtype = Literal["bfloat16", "float32", "float16"]

# Of the logits. Trained models are at 2 to 4: enough for a clear first choice most of the time.
LOGIT_STD = 3.0

app = App(name="random_model.py")


@app.default
def make(
    shape: Shape,
    *,
    dtype: Dtype = "bfloat16",
    tokenizer: bool = False,
    folder: Path | None = None,
) -> None:
    """Make the model unless it is there, and print its folder.

    Parameters
    ----------
    shape:
        The sizes of a published model; llama-tiny is for tests.
    dtype:
        Of the weights.
    tokenizer:
        Put a tokenizer beside them, for requests with texts, stop strings and grammars.
    folder:
        Where to put it; the user's cache folder if not given.
    """
    name = f"{shape}-{dtype}-text" if tokenizer else f"{shape}-{dtype}"
    folder = folder or cache_folder() / name
    if not (folder / "config.json").exists():
        config = config_of(shape)
        save_random_model(config, getattr(torch, dtype), folder, has_tokenizer=tokenizer)
    print(folder)


def cache_folder() -> Path:
    """Where random models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "footplate/random"


def config_of(shape: Shape) -> PreTrainedConfig:
    """The sizes of JackFram/llama-160m and of Qwen/Qwen3-0.6B, and a tiny one."""
    if shape == "qwen3-0.6b":
        return Qwen3Config(
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            vocab_size=151_936,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
        )
    is_tiny = shape == "llama-tiny"
    return LlamaConfig(
        hidden_size=64 if is_tiny else 768,
        num_hidden_layers=2 if is_tiny else 12,
        num_attention_heads=4 if is_tiny else 12,
        intermediate_size=128 if is_tiny else 3072,
        vocab_size=1000 if is_tiny else 32_000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )


def save_random_model(
    config: PreTrainedConfig, dtype: torch.dtype, folder: Path, *, has_tokenizer: bool = False
) -> None:
    """Write config.json, safetensors and perhaps a tokenizer, whose end of a text is then the
    model's too. The folder appears complete or not at all."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if has_tokenizer:
        config.eos_token_id = EOS_TOKEN_ID
    model = build(config, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "model")
        if has_tokenizer:
            save_tokenizer(config.vocab_size, Path(scratch) / "model")
        # Another process may have made it meanwhile: theirs is as good.
        if not folder.exists():
            shutil.move(Path(scratch) / "model", folder)


def build(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A model whose every linear keeps the scale of its input, so that each layer matters, and
    whose logits have a standard deviation of `LOGIT_STD`."""
    # Any: transformers' own annotations are not meant for strict checking.
    kind: Any = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device="cpu")
    # Rotary frequencies are no weights: what `to_empty` left there is replaced on loading.
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.ones_(weight)  # a norm
            continue
        std = weight.shape[1] ** -0.5
        if "lm_head" in name or ("embed_tokens" in name and config.tie_word_embeddings):
            std *= LOGIT_STD
        elif "embed_tokens" in name:
            std = 1.0
        with torch.no_grad():
            weight.normal_(std=std, generator=generator)
    return model


if __name__ == "__main__":
    sys.exit(app())
