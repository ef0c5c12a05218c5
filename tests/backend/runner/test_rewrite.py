"""What looks like one of our modules is replaced if it computes the same, and left alone if not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from footplate.backend.kernels.linear import Quantization
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.cpu_attention import CpuAttention
from footplate.backend.runner.direct_forward import DirectForward
from footplate.backend.runner.mapped_weights import MappedWeights
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.probe import probe_paged
from footplate.backend.runner.recording import relative_error
from footplate.backend.runner.rewrite import rewrite_model

VOCAB_SIZE = 320
PROMPT = [(7 * i + 3) % VOCAB_SIZE for i in range(50)]


def make_llama(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**config, **overrides}))
    return model.to(dtype).eval()


def rewrite(
    model: Any,
    kernels: Kernels,
    backend: CpuAttention,
    shapes: Any,
    quantization: Quantization | None = None,
) -> DirectForward | None:
    return rewrite_model(
        model,
        kernels,
        backend,
        shapes,
        block_size=16,
        max_model_len=128,
        mapped=MappedWeights(Path("/nowhere")),
        quantization=quantization,
    )


def rewritten(
    model: Any,
    kernels: Kernels,
    quantization: Quantization | None = None,
    directly: bool = False,
    num_blocks: int = 8,
) -> PagedModel:
    backend = CpuAttention(kernels, 16)
    shapes = probe_paged(model, backend, 16, set())
    direct = rewrite(model, kernels, backend, shapes, quantization)
    assert direct is not None or not directly
    return PagedModel(model, backend, num_blocks, shapes, direct if directly else None)


def logits_of(paged: PagedModel, start: int = 0) -> torch.Tensor:
    """[len(PROMPT), VOCAB_SIZE]"""
    block_ids = [0] * (start // 16) + [3, 1, 4, 0]
    chunk = Chunk(PROMPT, start, block_ids)
    return paged.forward(RaggedBatch.of_chunks([chunk], range(len(PROMPT)), 16))


@torch.inference_mode()
def expected_logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0]
    return logits.float()


def num_weights_left(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_a_plain_model_is_replaced_whole_and_keeps_no_second_copy(kernels: Kernels) -> None:
    model = make_llama()
    expected = expected_logits(model)
    assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5
    assert num_weights_left(model) == VOCAB_SIZE * 256  # the embedding


def test_an_embedding_that_shares_the_weights_of_the_last_layer_keeps_none(
    kernels: Kernels,
) -> None:
    model = make_llama(tie_word_embeddings=True)
    expected = expected_logits(model)
    assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5
    assert num_weights_left(model) == 0


@contextmanager
def changed(cls: type, name: str, value: Any) -> Iterator[None]:
    original = getattr(cls, name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        setattr(cls, name, original)


def test_a_layer_that_scales_its_residual_is_not_taken_for_a_plain_one(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    original = modeling_llama.LlamaDecoderLayer.forward

    def scaled(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + 0.9 * (
            original(self, hidden_states, *args, **kwargs) - hidden_states
        )

    model = make_llama()
    with changed(modeling_llama.LlamaDecoderLayer, "forward", scaled), caplog.at_level("INFO"):
        expected = expected_logits(model)
        assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5
    assert "left as they were" in caplog.text
    assert "model.layers.0'" in caplog.text  # and the modules within it are replaced one by one
    assert "'LlamaMLP': 2" in caplog.text


def test_a_gated_mlp_that_clamps_is_left_to_its_linear_layers(kernels: Kernels) -> None:
    def clamped(self: Any, x: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        y: torch.Tensor = self.down_proj(gated.clamp(max=1e-3))
        return y

    model = make_llama()
    with changed(modeling_llama.LlamaMLP, "forward", clamped):
        expected = expected_logits(model)
        assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.06), ("int4", 0.3)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_logits_are_near(
    kernels: Kernels, quantization: Quantization, tolerance: float, tied: bool, dtype: torch.dtype
) -> None:
    model = make_llama(dtype, tie_word_embeddings=tied)
    expected = expected_logits(model)
    error = relative_error(logits_of(rewritten(model, kernels, quantization)), expected)
    assert 1e-3 < error < tolerance
    assert num_weights_left(model) == (0 if tied else VOCAB_SIZE * 256)


def test_what_is_not_right_is_not_quantised_either(kernels: Kernels) -> None:
    """Eight bits would hide a wrong multiplier of a few per cent."""
    original = modeling_llama.LlamaMLP.forward

    def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = 1.01 * original(self, x)  # type: ignore[no-untyped-call]
        return y

    model = make_llama()
    with changed(modeling_llama.LlamaMLP, "forward", scaled):
        paged = rewritten(model, kernels, "int8")
        assert model.model.layers[0].mlp.forward.__func__ is scaled
        logits_of(paged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_the_wrappers_the_logits_are_the_same(
    kernels: Kernels, tied: bool, quantization: Quantization | None, dtype: torch.dtype
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    overrides = {"tie_word_embeddings": tied, "rope_parameters": rope}
    wrapped = rewritten(make_llama(dtype, **overrides), kernels, quantization)
    direct = rewritten(make_llama(dtype, **overrides), kernels, quantization, directly=True)
    # Far behind the first table of positions too.
    for start in (0, 16, 4096):
        assert torch.equal(logits_of(direct, start), logits_of(wrapped, start))


def test_a_model_that_does_something_to_its_logits_keeps_its_wrappers(kernels: Kernels) -> None:
    original = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output: Any = original(self, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    model = make_llama()
    backend = CpuAttention(kernels, 16)
    with changed(LlamaForCausalLM, "forward", scaled):
        shapes = probe_paged(model, backend, 16, set())
        assert rewrite(model, kernels, backend, shapes) is None


def test_positions_whose_frequencies_depend_on_the_length_keep_the_wrappers(
    kernels: Kernels,
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_llama(rope_parameters=rope)
    backend = CpuAttention(kernels, 16)
    shapes = probe_paged(model, backend, 16, set())
    assert rewrite(model, kernels, backend, shapes) is None


def test_queries_that_are_scaled_far_behind_are_seen(kernels: Kernels) -> None:
    """Ministral 3 scales them from `original_max_position_embeddings` on."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = Ministral3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    model: Any = Ministral3ForCausalLM(config)
    model.eval()
    expected = expected_logits(model)  # 50 tokens: scaled from the 33rd on
    assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5


def test_a_candidate_that_cannot_be_built_is_left_alone(
    kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama(attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = None  # queries and values have theirs
    with caplog.at_level("INFO"):
        expected = expected_logits(model)
        assert relative_error(logits_of(rewritten(model, kernels)), expected) < 1e-5
    assert "'LlamaMLP': 2" in caplog.text
