"""Routers with our product: the same choices, and the same for a token in any batch."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from footplate.backend.kernels.linear import PackedLinear
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.packed_router import apart, looks_like_router, pack_router
from footplate.backend.runner.recording import Call

HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 48, 6, 2

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
Routed = tuple[torch.Tensor, ...]


class Router(nn.Module):
    """As most families route: the softmax of a product in the model's type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN_SIZE), requires_grad=False)

    def forward(self, x: torch.Tensor) -> Routed:
        return self.choose(functional.linear(x.view(-1, HIDDEN_SIZE), self.weight))

    def choose(self, logits: torch.Tensor) -> Routed:
        weights, index = logits.softmax(-1).topk(TOP_K)
        return logits, weights, index


class WideRouter(Router):
    """As the DeepSeek family routes: in float32, with sigmoids."""

    def forward(self, x: torch.Tensor) -> Routed:
        x = x.view(-1, HIDDEN_SIZE).type(torch.float32)
        logits = functional.linear(x, self.weight.type(torch.float32))
        weights, index = logits.sigmoid().topk(TOP_K, sorted=False)
        return logits, weights / weights.sum(-1, keepdim=True), index


class BiasedRouter(Router):
    """With a bias, and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(NUM_EXPERTS), requires_grad=False)

    def forward(self, x: torch.Tensor) -> Routed:
        return self.choose(functional.linear(x, weight=self.weight, bias=self.bias))


class LinearRouter(nn.Linear):
    """A linear layer that goes on to choose."""

    def __init__(self) -> None:
        super().__init__(HIDDEN_SIZE, NUM_EXPERTS, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Routed:  # type: ignore[override]
        logits = super().forward(x)
        return logits, *logits.float().sigmoid().topk(TOP_K)


class RouterOfModules(nn.Module):
    """With a linear layer of its own, for sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN_SIZE, NUM_EXPERTS).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Routed:
        _, _, hidden_size = x.shape
        logits = self.gate(x.view(-1, hidden_size)).float()
        return logits, *logits.sigmoid().topk(TOP_K)


ROUTERS = [Router, WideRouter, BiasedRouter, LinearRouter]


def make(kind: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return kind().to(dtype)


def pack(kernels: Kernels, router: Any, x: torch.Tensor) -> bool:
    call = Call((x,), {}, router(x))
    assert looks_like_router(call)
    return pack_router(kernels, router, call, 1e-5 if x.dtype is torch.float32 else 1e-2)


@both_dtypes
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_packed_router_chooses_alike(kernels: Kernels, kind: Any, dtype: torch.dtype) -> None:
    router, x = make(kind, dtype), torch.randn(23, HIDDEN_SIZE).to(dtype)
    logits, weights, index = router(x)
    assert pack(kernels, router, x)
    got = router(x)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got[0], logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], weights, rtol=tolerance, atol=tolerance)
    assert got[2].shape == index.shape and (got[2] == index).float().mean() > 0.9


@both_dtypes
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_token_is_routed_alike_in_any_batch(
    kernels: Kernels, kind: Any, dtype: torch.dtype
) -> None:
    router, x = make(kind, dtype), torch.randn(7000, HIDDEN_SIZE).to(dtype)
    assert pack(kernels, router, x[:23])
    expected = router(x)
    for num_rows in (1, 2, 3, 8, 17, 64, 65, 5462):
        for first in (0, 1, 13):
            rows = slice(first, first + num_rows)
            for got, whole in zip(router(x[rows]), expected, strict=True):
                assert torch.equal(got, whole[rows])


def test_a_router_of_modules_is_given_whole_vectors_of_rows(kernels: Kernels) -> None:
    router, x = make(RouterOfModules, torch.float32), torch.randn(1, 90, HIDDEN_SIZE)
    gate = router.gate
    assert pack(kernels, router, x[:, :23])
    gate.forward = PackedLinear(kernels, gate.weight, gate.bias)
    expected = router(x)
    for num_rows in range(1, 70):
        for got, whole in zip(router(x[:, 3 : 3 + num_rows]), expected, strict=True):
            assert torch.equal(got, whole[3 : 3 + num_rows])


def test_torch_itself_routes_by_what_stands_beside_a_token() -> None:
    """The proof that the test above can fail."""
    router, x = make(WideRouter, torch.float32), torch.randn(200, HIDDEN_SIZE)
    expected = router(x)
    assert any(
        not torch.equal(got, whole[:num_rows])
        for num_rows in range(1, 100)
        for got, whole in zip(router(x[:num_rows]), expected, strict=True)
    )


class Reshaping(Router):
    def forward(self, x: torch.Tensor) -> Routed:
        return self.choose(x @ self.weight.T)


class Scoring(Router):
    """Gives something that is no row per token."""

    def forward(self, x: torch.Tensor) -> Routed:
        return *super().forward(x), x.new_zeros(7)


@pytest.mark.parametrize("kind", [Reshaping, Scoring])
def test_a_router_of_another_structure_is_left_as_it_was(kernels: Kernels, kind: Any) -> None:
    router, x = make(kind, torch.float32), torch.randn(23, HIDDEN_SIZE)
    weight, expected = router.weight, router(x)
    assert not pack(kernels, router, x)
    assert router.weight is weight and isinstance(weight, nn.Parameter)
    assert "forward" not in vars(router)
    assert all(torch.equal(a, b) for a, b in zip(router(x), expected, strict=True))


def test_a_module_without_choices_is_no_router() -> None:
    x = torch.randn(3, 4)
    linear = nn.Linear(4, 5)
    assert not looks_like_router(Call((x,), {}, linear(x)))
    assert not looks_like_router(Call((x,), {}, (x, x.argmax(-1))))


@both_dtypes
def test_the_sigmoid_of_a_single_output_is_the_same_in_any_batch(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    linear = PackedLinear(kernels, torch.randn(1, HIDDEN_SIZE).to(dtype))
    gate, x = apart(linear), torch.randn(90, HIDDEN_SIZE).to(dtype)
    assert torch.equal(gate(x), linear(x))
    expected = gate(x).sigmoid()
    for num_rows in range(1, 70):
        assert torch.equal(gate(x[3 : 3 + num_rows]).sigmoid(), expected[3 : 3 + num_rows])
