"""The probe lets an architecture through only if the paged path computes what the model does."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.runner import probe
from footplate.backend.runner.limits import attention_windows
from footplate.backend.runner.paged_model import ATTENTION_NAME
from footplate.backend.runner.probe import NotPagedError, probe_paged
from footplate.backend.runner.torch_attention import TorchAttention

from .architectures import WINDOW, make_model
from .driver import Loader

CPU = torch.device("cpu")


def run_probe(model: Any, max_model_len: int = 128) -> None:
    windows = attention_windows(model.config, max_model_len)
    probe_paged(model, TorchAttention(CPU, 4), 4, windows)


def refusal(architecture: str, **overrides: Any) -> str:
    with pytest.raises(NotPagedError) as caught:
        run_probe(make_model(architecture, **overrides))
    return str(caught.value)


def test_an_architecture_that_ignores_the_interface_is_noticed() -> None:
    assert refusal("falcon") == "0 of 3 layers use the attention interface"


def test_state_beside_attention_is_noticed() -> None:
    assert refusal("lfm2") == "1 of 3 layers use the attention interface"


def test_recurrence_beside_attention_in_every_layer_is_noticed() -> None:
    options = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
    assert "logits differ" in refusal("falcon_h1", mamba_chunk_size=8, **options)


def test_two_attention_calls_in_one_layer_are_noticed() -> None:
    assert refusal("diffllama") == "a layer calls attention more than once"


def test_a_mask_of_the_model_itself_is_noticed() -> None:
    assert "makes its own attention mask" in refusal("doge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_in_the_mask_alone_changes_the_logits(dtype: torch.dtype) -> None:
    model = make_model("phimoe", sliding_window=WINDOW).to(dtype)
    with pytest.raises(NotPagedError, match="logits differ"):
        run_probe(model)


def test_a_chunk_in_the_mask_alone_changes_the_logits() -> None:
    assert "logits differ" in refusal("llama4_text")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("phimoe", {"sliding_window": 100}), ("llama4_text", {"attention_chunk_size": 100})],
)
def test_a_window_too_long_to_try_must_reach_the_layers(
    architecture: str, overrides: dict[str, Any]
) -> None:
    assert refusal(architecture, **overrides) == "no layer is told of its window of 100 tokens"
    # Where no request can be that long, the window does not matter.
    run_probe(make_model(architecture, **overrides), max_model_len=100)


@pytest.mark.parametrize("window", [100, WINDOW])
def test_a_window_that_reaches_the_layers_is_fine(window: int) -> None:
    run_probe(make_model("mistral", sliding_window=window))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "opt"])
def test_rounding_in_bfloat16_is_no_reason(architecture: str) -> None:
    run_probe(make_model(architecture).to(torch.bfloat16))


def test_the_model_keeps_its_own_attention() -> None:
    for architecture in ("llama", "falcon", "phimoe"):
        model = make_model(architecture)
        before = model.config._attn_implementation
        assert before != ATTENTION_NAME
        tokens = torch.arange(9)[None]
        with torch.inference_mode():
            expected = model(tokens).logits
            try:
                run_probe(model)
            except NotPagedError:
                assert architecture == "falcon"
            assert model.config._attn_implementation == before
            assert torch.equal(model(tokens).logits, expected)


def test_a_large_error_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TOLERANCE_ELSE", 1e-12)
    assert "logits differ" in refusal("llama")


def test_what_the_probe_found_is_said_once(
    load: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("falcon").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        facts = load(tmp_path).facts
    assert facts.model.attention == "per-request cache"
    assert not facts.supports_prefix_caching
    assert caplog.messages == [
        "FalconForCausalLM gets a forward and a cache per request, not paged attention: "
        "0 of 3 layers use the attention interface"
    ]


@pytest.mark.parametrize(("max_model_len", "is_paged"), [(None, True), (40, True), (100, False)])
def test_longrope_is_paged_up_to_its_original_length(
    max_model_len: int | None, is_paged: bool, load: Loader, tmp_path: Path
) -> None:
    """Beyond it, one long request would change the positions of all others in its step."""
    factors = [1.0, 1.5, 2.0, 4.0]
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors[::-1],
    }
    rope |= {"original_max_position_embeddings": 40, "rope_theta": 10_000.0}
    model = make_model(
        "phi3", sliding_window=None, rope_parameters=rope, original_max_position_embeddings=40
    )
    model.save_pretrained(tmp_path)
    runner = load(tmp_path, max_model_len=max_model_len)
    assert (runner.facts.model.attention == "paged torch") is is_paged
    assert runner.facts.model.max_model_len == (max_model_len or 40)
