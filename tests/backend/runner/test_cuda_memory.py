"""The arithmetic of GPU memory, with the numbers of a GPU that is not there."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from footplate.backend.runner import cuda_memory
from footplate.backend.runner.attention_backend import LayerShape
from footplate.backend.runner.batch import RaggedBatch
from footplate.backend.runner.torch_attention import TorchAttention
from footplate.backend.runner.torch_step import TorchStep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 350)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600, 1000))


def test_utilization_is_a_fraction_of_all_memory() -> None:
    assert cuda_memory.free_bytes(CPU, 0.9) == 500
    assert cuda_memory.free_bytes(CPU, 0.3) == 0, "more is in use already"


def test_the_largest_step_is_run_over_the_longest_context() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=20, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model: Any = LlamaForCausalLM(config)

    batches: list[RaggedBatch] = []
    caches: list[LayerShape] = []

    class Watched(TorchAttention):
        def begin_step(self, batch: RaggedBatch) -> TorchStep:
            batches.append(batch)
            return super().begin_step(batch)

        def allocate(self, shapes: Mapping[int, LayerShape], num_blocks: int) -> Any:
            assert num_blocks == 10
            caches.extend(shapes.values())
            return super().allocate(shapes, num_blocks)

    backend = Watched(CPU, 4)
    num_bytes = cuda_memory.largest_step_bytes(
        model,
        backend,
        {layer: LayerShape(1, 8, 8, torch.float32) for layer in range(3)},
        block_size=4,
        num_tokens=64,
        num_seqs=5,
        max_model_len=40,
    )
    assert num_bytes == 250
    assert len(caches) == 1, "layers of one shape share a cache"
    (batch,) = batches
    assert len(batch.token_ids) == 64
    ends = [chunk.start + len(chunk.token_ids) for chunk in batch.chunks]
    assert ends == [40, 40]
    assert len(batch.logit_rows) == 5
