"""Whatever is wrong with a model's folder is said in one line that names the cause."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.runner.checkpoint import (
    check_files,
    find_folder,
    load_config,
    load_model,
)
from footplate.backend.runner.errors import ModelLoadError
from footplate.backend.runner.load import DEMO_MODEL
from footplate.protocol.config import ModelConfig
from footplate.protocol.errors import EngineStartError

CPU = torch.device("cpu")
SaveLlama = Callable[..., Path]


def load(folder: Path, **options: Any) -> Any:
    check_files(folder)
    return load_model(folder, load_config(folder), ModelConfig(model=str(folder), **options), CPU)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    assert isinstance(caught.value, EngineStartError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_saved_model_loads(save_llama: SaveLlama) -> None:
    model = load(save_llama())
    assert not model.training
    assert model.dtype is torch.float32


def test_a_name_is_a_folder_the_demo_or_a_cached_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_folder("demo") == DEMO_MODEL
    assert find_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelLoadError, match=r"nobody/nothing is neither a folder nor in"):
        find_folder("nobody/nothing")
    with pytest.raises(ModelLoadError, match=r"^/no/such/folder does not exist$"):
        find_folder("/no/such/folder")
    (tmp_path / "file").touch()
    with pytest.raises(ModelLoadError, match=r"is a file: name the folder"):
        find_folder(str(tmp_path / "file"))


def test_a_cached_model_is_found_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--works--engine"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    (cached / "snapshots" / "c0ffee").mkdir(parents=True)
    assert find_folder("works/engine") == cached / "snapshots" / "c0ffee"


def test_no_config(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} holds no config.json"


def test_no_weights(save_llama: SaveLlama) -> None:
    folder = save_llama()
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} holds no model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert refusal(folder).endswith(
        "; pytorch_model.bin is a pickle, which can run any code: convert it"
    )


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights(damage: str, save_llama: SaveLlama) -> None:
    file = save_llama() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-7], "garbage": b"x" * 999, "empty": b""}[damage])
    assert refusal(file.parent).startswith(f"{file} is damaged: ")


def test_a_missing_shard(save_llama: SaveLlama) -> None:
    folder = save_llama(shard="4KB")
    load(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refusal(folder) == f"{shard} is missing: the download is not complete"


def test_a_damaged_index(save_llama: SaveLlama) -> None:
    folder = save_llama(shard="4KB")
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    assert refusal(folder).startswith(f"{index} is damaged: ")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "..", "", 7])
def test_an_index_that_names_a_file_elsewhere(name: object, save_llama: SaveLlama) -> None:
    folder = save_llama(shard="4KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert refusal(folder) == f"{index} is damaged: {name!r} is no file of this folder"


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_weights_of_another_shape(save_llama: SaveLlama) -> None:
    folder = save_llama()
    change_config(folder, intermediate_size=32)
    assert refusal(folder).startswith(f"cannot load {folder}: ")


def test_weights_that_lack_a_layer(save_llama: SaveLlama) -> None:
    """transformers would fill the gap with random numbers, and say so in a table."""
    folder = save_llama()
    change_config(folder, num_hidden_layers=3)
    message = refusal(folder)
    assert message.startswith(f"the weights in {folder} lack 9 of the model's tensors, model.lay")


def test_tied_weights_are_not_missing(save_llama: SaveLlama) -> None:
    model = load(save_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_unknown_architecture(save_llama: SaveLlama) -> None:
    folder = save_llama()
    change_config(folder, model_type="steam")
    assert "`steam`" in refusal(folder)


def add_code(folder: Path, **fields: Any) -> None:
    """Let a configuration name code that comes with the model."""
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(folder, auto_map=names, **fields)


def test_a_model_that_needs_the_code_it_comes_with_is_refused(save_llama: SaveLlama) -> None:
    folder = save_llama()
    add_code(folder, model_type="steam")
    message = refusal(folder)
    assert message.startswith(f"{folder}/config.json names code that comes with the model")
    assert "never run" in message


def test_code_that_comes_with_a_known_architecture_is_never_run(save_llama: SaveLlama) -> None:
    folder = save_llama()
    add_code(folder)
    assert type(load(folder)).__module__.startswith("transformers.")


def test_nobody_can_ask_for_code_that_comes_with_a_model() -> None:
    with pytest.raises(TypeError, match="trust_remote_code"):
        ModelConfig(trust_remote_code=True)  # type: ignore[call-arg]


def test_broken_json(save_llama: SaveLlama) -> None:
    folder = save_llama()
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("saved", "requested", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype(
    saved: torch.dtype, requested: Any, expected: torch.dtype, save_llama: SaveLlama
) -> None:
    assert load(save_llama(dtype=saved), dtype=requested).dtype is expected


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("requested", ["auto", "float16"])
def test_float16_becomes_bfloat16_on_a_cpu(
    requested: Any, in_config: bool, save_llama: SaveLlama, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_llama(dtype=torch.float16)
    if not in_config:
        change_config(folder, dtype=None)
    with caplog.at_level(logging.WARNING):
        assert load(folder, dtype=requested).dtype is torch.bfloat16
    assert len(caplog.messages) == 1
