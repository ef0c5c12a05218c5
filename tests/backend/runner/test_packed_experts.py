"""Packed experts against transformers' own, and against themselves in another batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from footplate.backend.kernels.experts import PackedExperts
from footplate.backend.kernels.linear import Activation
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.runner.packed_experts import (
    activation_of,
    drop_weights,
    experts_match,
    looks_like_experts,
    pack_experts,
)
from footplate.backend.runner.recording import Call
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K = 48, 40, 6, 2
CLASSES: dict[str, Activation] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@use_experts_implementation(is_concatenated=False, is_transposed=True, has_bias=True)
class OtherLayout(nn.Module):
    """Experts with biases, matrices for rows on the left, and gate and up in turns."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        num_experts, hidden, size = NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, hidden, 2 * size))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, 2 * size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2]

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed by the library's own implementation")


class Clamped(MixtralExperts):
    """Experts that differ from others where they are loud, and do not say so."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


class DeclaredClamped(Clamped):
    """Experts that name their bound, as DeepSeek V4's."""

    limit = 10.0


class Doubled(MixtralExperts):
    """Experts with a factor of their own."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return 2 * nn.functional.silu(gate) * up


def make(
    dtype: torch.dtype = torch.float32, kind: Any = MixtralExperts, activation: str = "silu"
) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_local_experts=NUM_EXPERTS,
        hidden_act=activation,
    )
    config._experts_implementation = "batched_mm"
    experts = kind(config).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, HIDDEN_SIZE**-0.5)
    return experts


def routed(dtype: torch.dtype, num_tokens: int = 33, weights: torch.dtype | None = None) -> Rows:
    """Rows, the experts of each, and their weights."""
    index = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    shares = torch.rand(num_tokens, TOP_K).to(weights or dtype)
    return torch.randn(num_tokens, HIDDEN_SIZE).to(dtype), index, shares


def packed_of(kernels: Kernels, experts: Any) -> PackedExperts:
    activation = activation_of(experts, CLASSES)
    assert activation is not None
    return pack_experts(kernels, experts, activation)


def matches(kernels: Kernels, experts: Any, rows: Rows) -> bool:
    call = Call(rows, {}, experts(*rows))
    return experts_match(packed_of(kernels, experts), experts, call, TOLERANCE[rows[0].dtype])


@both_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_packed_experts_are_the_librarys(
    kernels: Kernels, dtype: torch.dtype, activation: str
) -> None:
    experts = make(dtype, activation=activation)
    rows = routed(dtype)
    got = packed_of(kernels, experts)(*rows)
    assert got.dtype is dtype
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(got, experts(*rows), rtol=tolerance, atol=tolerance)


@both_dtypes
def test_layout_and_biases_are_taken_from_what_the_module_declares(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    experts = make(dtype, OtherLayout)
    assert looks_like_experts(experts)
    assert matches(kernels, experts, routed(dtype))


@both_dtypes
def test_a_clamp_that_the_module_declares_is_computed(kernels: Kernels, dtype: torch.dtype) -> None:
    assert matches(kernels, make(dtype, DeclaredClamped), routed(dtype))


@both_dtypes
def test_experts_of_gpt_oss_are_computed(kernels: Kernels, dtype: torch.dtype) -> None:
    config = GptOssConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_local_experts=NUM_EXPERTS,
    )
    config._experts_implementation = "batched_mm"
    kind: Any = GptOssExperts
    experts = kind(config).to(dtype).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, HIDDEN_SIZE**-0.5)
    assert looks_like_experts(experts)
    assert matches(kernels, experts, routed(dtype))
    experts.alpha = 1.0
    rows = routed(dtype)
    call = Call(rows, {}, experts(*rows))
    experts.alpha = 1.702
    assert not experts_match(packed_of(kernels, experts), experts, call, TOLERANCE[dtype])


def test_weights_wider_than_the_model_are_not_rounded(kernels: Kernels) -> None:
    experts = make(torch.bfloat16)
    x, index, weights = routed(torch.bfloat16, weights=torch.float32)
    got = packed_of(kernels, experts)(x, index, weights)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, experts(x, index, weights), rtol=0.05, atol=0.02)
    assert not torch.equal(got, packed_of(kernels, experts)(x, index, weights.bfloat16()))


@both_dtypes
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_token_is_answered_alike_in_any_batch(
    kernels: Kernels, dtype: torch.dtype, weights: torch.dtype
) -> None:
    packed = packed_of(kernels, make(dtype))
    x, index, shares = routed(dtype, 70, weights)
    expected = packed(x, index, shares)
    for num_rows in (1, 2, 3, 8, 17, 64):
        for first in (0, 1, 5):
            rows = slice(first, first + num_rows)
            assert torch.equal(packed(x[rows], index[rows], shares[rows]), expected[rows])


def test_an_expert_nobody_was_routed_to_is_checked(kernels: Kernels) -> None:
    experts = make()
    x, index, weights = routed(torch.float32)
    rows = (x, index.clamp(max=NUM_EXPERTS - 2), weights)
    packed = packed_of(kernels, experts)
    call = Call(rows, {}, experts(*rows))
    assert experts_match(packed, experts, call, 1e-5)
    experts.down_proj[NUM_EXPERTS - 1] *= 1.1
    assert torch.equal(experts(*rows), call.output), "the recorded call does not show it"
    assert not experts_match(packed, experts, call, 1e-5)


@both_dtypes
@pytest.mark.parametrize("kind", [Doubled, Clamped])
def test_another_formula_does_not_match(kernels: Kernels, dtype: torch.dtype, kind: Any) -> None:
    assert matches(kernels, make(dtype), routed(dtype))
    assert not matches(kernels, make(dtype, kind), routed(dtype))


def test_experts_without_a_declared_layout_are_not_taken_for_ours() -> None:
    experts = make()
    assert looks_like_experts(experts)
    experts.has_gate = False
    assert not looks_like_experts(experts)
    assert not looks_like_experts(nn.Linear(3, 3))


def test_a_type_and_sizes_that_kernels_do_not_know_are_not_taken_for_ours() -> None:
    assert not looks_like_experts(make(torch.float16))
    experts = make(torch.bfloat16)
    experts.down_proj = nn.Parameter(experts.down_proj[..., 1:])
    assert not looks_like_experts(experts)


def test_experts_that_are_called_otherwise_do_not_match(kernels: Kernels) -> None:
    experts = make()
    x, index, weights = rows = routed(torch.float32)
    packed, expected = packed_of(kernels, experts), experts(*rows)
    assert experts_match(packed, experts, Call(rows, {}, expected), 1e-5)
    for args, kwargs in (
        ((x, index), {"top_k_weights": weights}),
        ((x[None], index, weights), {}),
        ((x.bfloat16(), index, weights), {}),
        ((x, index.int(), weights), {}),
        ((x, index, weights.repeat(1, 2)), {}),
    ):
        assert not experts_match(packed, experts, Call(args, kwargs, expected), 1e-5)


def test_an_activation_we_do_not_have_is_named_by_nobody() -> None:
    assert activation_of(make(activation="relu"), CLASSES) is None


def test_dropped_weights_take_no_memory(kernels: Kernels) -> None:
    experts = make()
    rows = routed(torch.float32)
    packed = packed_of(kernels, experts)
    expected = packed(*rows)
    drop_weights(experts)
    assert sum(parameter.nbytes for parameter in experts.parameters()) == 0
    assert torch.equal(packed(*rows), expected)


@pytest.fixture
def load_mixtral(tmp_path: Path) -> Callable[[], Any]:
    """Loads a tiny Mixtral as the engine does, and gives the network."""

    def load() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=61,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=NUM_EXPERTS,
        )
        network: Any = MixtralForCausalLM(config)
        network.save_pretrained(tmp_path)
        runner: Any = load_model_runner(
            ModelConfig(model=str(tmp_path), num_threads=1, device="cpu", dtype="float32"),
            CacheConfig(num_gpu_blocks_override=8),
            SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
            lambda phase, fraction: None,
        )
        return runner._model._model

    return load


def test_experts_are_replaced_and_released_as_a_model_is_loaded(
    load_mixtral: Callable[[], Any],
) -> None:
    for layer in load_mixtral().model.layers:
        assert isinstance(layer.mlp.experts.forward, PackedExperts)
        assert layer.mlp.experts.gate_up_proj.numel() == 0


def test_experts_with_another_formula_are_left_as_they_were_in_one_line(
    load_mixtral: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(MixtralExperts, "_apply_gate", Doubled._apply_gate)
    with caplog.at_level("INFO"):
        network = load_mixtral()
    for layer in network.model.layers:
        assert not isinstance(layer.mlp.experts.forward, PackedExperts)
        assert layer.mlp.experts.gate_up_proj.numel() > 0
    [line] = [message for message in caplog.messages if "left as they were" in message]
    assert "model.layers.1.mlp.experts" in line
