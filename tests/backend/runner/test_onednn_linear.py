"""Linear layers packed for oneDNN: where they are faster, and only where they compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from footplate.backend.runner import onednn_linear
from footplate.backend.runner.mapped_weights import MappedWeights
from footplate.backend.runner.onednn_linear import OneDnnLinear, pack_linears
from footplate.backend.runner.recording import relative_error

NOTHING_MAPPED = MappedWeights(Path("/nowhere"))
IDS = torch.arange(12)[None]


@pytest.fixture(autouse=True)
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice by timings is not what is tested here."""
    monkeypatch.setattr(onednn_linear, "_takes_less", lambda packed, plain, x: True)


def make_llama(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    config: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**config, **overrides}))
    return model.to(dtype).eval()


def packed_layers(model: Any) -> int:
    return sum(isinstance(module.forward, OneDnnLinear) for module in model.modules())


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_layers_compute_the_same_and_drop_their_weights(
    dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    model = make_llama(dtype, tie_word_embeddings=tied)
    expected = logits_of(model)
    pack_linears(model, NOTHING_MAPPED)
    assert packed_layers(model) == 2 * 7 + 1
    assert relative_error(logits_of(model), expected) <= tolerance
    left = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert left == 320 * 64  # the embedding, and what shares it


def test_a_layer_that_is_slower_packed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "_takes_less", lambda packed, plain, x: False)
    model = make_llama()
    pack_linears(model, NOTHING_MAPPED)
    assert packed_layers(model) == 0
    assert all(p.numel() for p in model.parameters())


def test_a_layer_of_another_class_or_with_a_hook_is_left_alone() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make_llama()
    model.lm_head.__class__ = Doubling
    hooked = model.model.layers[0].mlp.down_proj
    hooked.register_forward_hook(lambda module, args, output: -output)
    expected = logits_of(model)
    pack_linears(model, NOTHING_MAPPED)
    assert packed_layers(model) == 2 * 7 - 1
    assert relative_error(logits_of(model), expected) <= 1e-5


def test_a_cpu_that_cannot_pack_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("not for this type")

    monkeypatch.setattr(OneDnnLinear, "__init__", refuse)
    model = make_llama()
    expected = logits_of(model)
    pack_linears(model, NOTHING_MAPPED)
    assert packed_layers(model) == 0
    assert torch.equal(logits_of(model), expected)
