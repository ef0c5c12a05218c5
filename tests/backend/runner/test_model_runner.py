import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.request import Request
from footplate.backend.runner import model_runner
from footplate.backend.runner.errors import ModelLoadError
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.step import ModelRunner, StepPlan
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.token_params import TokenParams

SaveLlama = Callable[..., Path]
VOCAB_SIZE = 61  # of what `save_llama` makes
GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 8, 0, ())


def load(folder: Path, cache: CacheConfig | None = None, **options: Any) -> ModelRunner:
    return load_model_runner(
        ModelConfig(model=str(folder), **{"num_threads": 1, "device": "cpu", **options}),
        cache or CacheConfig(block_size=4),
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        lambda phase, fraction: None,
    )


def test_facts(save_llama: SaveLlama) -> None:
    folder = save_llama()
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    facts = load(folder).facts
    model = facts.model
    assert (model.model, model.tokenizer) == (str(folder), str(folder))
    assert model.architecture == "LlamaForCausalLM"
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, 96)
    assert model.eos_token_ids == (2, 7)
    assert (model.dtype, model.device, model.attention) == ("float32", "cpu", "paged torch")
    embeddings, per_layer = 2 * VOCAB_SIZE * 16, 2 * 16 * (16 + 8) + 3 * 16 * 24 + 2 * 16
    assert model.num_parameters == embeddings + 2 * per_layer + 16
    assert facts.num_kv_blocks == 4 * 24
    assert facts.supports_prefix_caching


def test_another_tokenizer(save_llama: SaveLlama) -> None:
    assert load(save_llama(), tokenizer="/elsewhere").facts.model.tokenizer == "/elsewhere"


def test_phases_are_announced(save_llama: SaveLlama) -> None:
    phases: list[str] = []
    load_model_runner(
        ModelConfig(model=str(save_llama()), num_threads=1, device="cpu"),
        CacheConfig(block_size=4),
        SchedulerConfig(),
        lambda phase, fraction: phases.append(phase),
    )
    assert phases == [
        "loading weights",
        "checking attention",
        "packing weights",
        "allocating KV cache",
        "warming up",
    ]


def test_max_model_len(save_llama: SaveLlama) -> None:
    folder = save_llama()
    assert load(folder, max_model_len=50).facts.model.max_model_len == 50
    with pytest.raises(ModelLoadError, match="max_model_len=97: the model's limit is 96 tokens"):
        load(folder, max_model_len=97)


def test_max_model_len_and_the_cache(save_llama: SaveLlama) -> None:
    folder = save_llama()
    cache = CacheConfig(block_size=4, kv_cache_memory_bytes=10 * 4 * 2 * 2 * 8 * 4)
    facts = load(folder, cache).facts
    assert (facts.num_kv_blocks, facts.model.max_model_len) == (10, 40)
    with pytest.raises(ModelLoadError, match="raise kv_cache_memory_bytes or lower max_model_len"):
        load(folder, cache, max_model_len=41)


def test_threads(save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_llama()
    try:
        load(folder, num_threads=2)
        assert torch.get_num_threads() == 2
        load(folder, num_threads=None)
        assert torch.get_num_threads() == 1, "the model is small"
        monkeypatch.setattr(model_runner, "SMALL_MODEL_BYTES", 0)
        load(folder, num_threads=None)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(1)


def test_cuda_without_a_gpu(save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="torch finds no usable GPU"):
        load(save_llama(), device="cuda")
    assert load(save_llama(), device="auto").facts.model.device == "cpu"


def test_an_empty_plan_and_one_that_samples_nobody(save_llama: SaveLlama) -> None:
    runner = load(save_llama())
    assert runner.execute(StepPlan()).token_ids == []
    assert runner.execute(StepPlan(released=[1, 2])).token_ids == []
    request = Request(1, b"", 1, [5, 6, 7, 8], 4, GREEDY, block_ids=[3])
    assert runner.execute(StepPlan([request], [2], [])).token_ids == []
    request.num_computed_tokens = 2
    assert len(runner.execute(StepPlan([request], [2], [0])).token_ids) == 1


@pytest.mark.parametrize("compiler", ["missing", "failing"])
def test_without_a_working_compiler_there_is_one_warning_and_a_runner(
    save_llama: SaveLlama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
) -> None:
    folder = save_llama()
    tools = tmp_path / "bin"
    tools.mkdir()
    if compiler == "failing":
        script = tools / "c++"
        script.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: no' >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runner = load(folder, CacheConfig(block_size=16))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage().startswith("no CPU kernels, torch does the work, more slowly: ")
    assert runner.facts.model.attention == "paged torch"
    request = Request(1, b"", 1, [5, 6, 7, 8], 4, GREEDY, block_ids=[3])
    assert len(runner.execute(StepPlan([request], [4], [0])).token_ids) == 1
