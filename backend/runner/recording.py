"""What the modules of a model were given, and what they made of it, in one forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


Recording = dict[nn.Module, Call]


@contextmanager
def record_calls(model: nn.Module) -> Iterator[Recording]:
    """Record the first call of every module of `model` while the context lasts.

    Tensors are kept, not copied: modules of inference code leave their inputs alone.
    """
    recording: Recording = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recording.setdefault(module, Call(args, kwargs, output))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(got: object, expected: object) -> float:
    """Root mean square of the difference over that of `expected`; infinite for what cannot be
    compared, such as tensors of different shape or anything that is not finite."""
    if not isinstance(got, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return float("inf")
    if got.shape != expected.shape or got.dtype is not expected.dtype:
        return float("inf")
    a, b = got.float(), expected.float()
    error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-20))
    return error if error == error else float("inf")
