"""Small random models of the architectures that Footplate runs exactly.

Every entry differs from a plain decoder in some way that a paged step could get wrong. Windows
and chunks are shorter than the prompts of the tests.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 211
WINDOW = 8
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 48}

# Served through the paged cache.
PAGED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "ministral": _MIXED,
    "qwen2": {"use_sliding_window": True, **_MIXED},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "gemma": {},
    # Eager for the reference: in some versions of transformers the other one ignores the cap.
    "gemma2": {
        **_MIXED,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
    "gemma3_text": _MIXED,
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "gpt2": _GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmoe": _MOE,
    "granite": {"attention_multiplier": 0.3},
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 0.3},
    "cohere": {},
    "cohere2": _MIXED,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "smollm3": {},
    "gpt_oss": {**_MIXED, "num_local_experts": 4},
    "starcoder2": {"sliding_window": WINDOW},
    "nemotron": {},
    "exaone4": _MIXED,
    "arcee": {},
    "apertus": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "helium": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "seed_oss": {},
    "bitnet": {},
    "persimmon": {},
    "biogpt": {},
    "gpt_bigcode": _GPT2,
}

# Served with a transformers cache per request.
PER_REQUEST: dict[str, dict[str, Any]] = {
    "falcon": {"multi_query": True, "alibi": False},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "codegen": {**_GPT2, "rotary_dim": 4, "n_ctx": 128},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
}
ARCHITECTURES = {**PAGED, **PER_REQUEST}
# What a default run asks every question of. Norms of heads; a window and a soft cap; experts beside
# a shared one with a gate, behind a router that is a linear layer, in float32 with sigmoids, with
# biases.
VARIED = ("llama", "qwen3", "gemma2", "qwen2_moe", "phimoe", "deepseek_v3", "gpt_oss")


def make_model(architecture: str, **overrides: Any) -> Any:
    """A float32 model whose greedy output is neither constant nor periodic.

    Fresh weights are small: attention is flat, layers add little, and greedy decoding repeats
    one token whatever the cache holds. So weights are drawn anew at a scale at which a wrong or
    missing key changes what comes next.

    Args:
        architecture: a `model_type` of transformers.
        overrides: fields of its configuration.
    """
    options = {**_COMMON, **ARCHITECTURES.get(architecture, {}), **overrides}
    if architecture == "falcon":
        del options["head_dim"]  # follows from the others there
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_embedding = "embed" in name or name.endswith(("wte.weight", "wpe.weight"))
            if is_embedding and parameter.ndim == 2:
                parameter.normal_(0, 1)
            elif parameter.ndim >= 2 and "conv" not in name and "A_log" not in name:
                fan_in = parameter.shape[-1]
                parameter.normal_(0, 2.5 * fan_in**-0.5)
            elif name.endswith(("sinks", "bias")):
                parameter.normal_(0, 0.1)
    return model
