"""Memory of weights goes back to the system, and their numbers stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from footplate.backend.runner.mapped_weights import MappedWeights

# Of weights whose pages are nearly all their own.
CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def resident_kib(folder: Path) -> int:
    """What the mapped files of a folder take of this process's memory."""
    total, is_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_weights = f" {folder}" in line
        elif is_weights and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.fixture
def model(tmp_path: Path) -> Any:
    original: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
    original.bfloat16().save_pretrained(tmp_path)
    # As the hub's cache has it: the name is a link to a file of another name.
    weights = tmp_path / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "blob"))
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(tmp_path)


def test_released_weights_take_no_memory_and_come_back_from_the_file(
    model: Any, tmp_path: Path
) -> None:
    weight = model.lm_head.weight
    before = weight.clone()  # touches all of it
    resident = resident_kib(tmp_path)
    MappedWeights(tmp_path).release(weight)
    assert resident - resident_kib(tmp_path) > 0.9 * weight.nbytes / 1024
    assert torch.equal(weight, before)


def test_memory_that_is_no_files_is_left_alone(model: Any, tmp_path: Path) -> None:
    tensor = torch.arange(100_000)
    mapped = MappedWeights(tmp_path)
    mapped.release(tensor)
    mapped.release(torch.empty(0))
    mapped.release(model.lm_head.weight.t())  # not in one piece
    assert torch.equal(tensor, torch.arange(100_000))


@torch.inference_mode()
def test_a_forward_that_gives_back_what_it_used_computes_the_same(
    model: Any, tmp_path: Path
) -> None:
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    resident = resident_kib(tmp_path)
    weights = sum(p.nbytes for p in model.parameters()) / 1024
    assert resident > 0.9 * weights - model.model.embed_tokens.weight.nbytes / 1024
    with MappedWeights(tmp_path).released_after_use(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert resident_kib(tmp_path) < 0.2 * weights
    assert not any(module._forward_hooks for module in model.modules())
