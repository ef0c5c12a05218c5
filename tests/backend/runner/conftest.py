"""For all tests of runners."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels

SaveLlama = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two threads on matrices of test size only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def save_llama(tmp_path: Path) -> SaveLlama:
    """Saves a tiny Llama, with fields of its configuration overridden, and names its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(dtype: torch.dtype = torch.float32, shard: str = "5GB", **overrides: Any) -> Path:
        options: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 96,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**{**options, **overrides}))
        model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
        return tmp_path

    return save


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The kernels of this machine."""
    library = build.load(build.cache_folder(os.environ))
    assert library is not None, "this machine has no compiler that works"
    return Kernels(library)
