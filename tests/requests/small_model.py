"""A llama of two layers with random weights, and with the first tokens of the demo tokenizer."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from footplate.backend.runner.load import DEMO_MODEL

from .levels import MERGES

VOCAB_SIZE = MERGES.stop
# Many, and most of them ordinary tokens: of random weights every output has one now and then.
EOS_TOKEN_IDS = (4, *MERGES[1::12])


def write_small_llama(folder: Path, max_model_len: int) -> None:
    """Logits have a standard deviation of 3, as those of trained models."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=max_model_len,
        tie_word_embeddings=False,
        initializer_range=64**-0.5,
        bos_token_id=0,
        eos_token_id=list(EOS_TOKEN_IDS),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    model_part = tokenizer["model"]
    vocabulary = {text: i for text, i in model_part["vocab"].items() if i < VOCAB_SIZE}
    model_part["vocab"] = vocabulary
    model_part["merges"] = [merge for merge in model_part["merges"] if "".join(merge) in vocabulary]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config_file = "tokenizer_config.json"
    (folder / config_file).write_text((DEMO_MODEL / config_file).read_text())
