"""Linear layers for CPUs where our own kernels are not used: oneDNN's, on weights packed once.

Weights as torch keeps them are rearranged on every call of a linear layer. oneDNN takes them
rearranged: 1.4 to 1.7 times faster in bfloat16 where tokens are few, on a CPU that MKL was not
written for 2 to 4 times in float32. On other CPUs it may lose: small matrices do everywhere, and
bfloat16 on ARM may fall to kernels that are there for reference. So one layer of each shape is
timed both ways.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from footplate.backend.runner.mapped_weights import MappedWeights
from footplate.backend.runner.recording import Call, record_calls, relative_error
from footplate.backend.runner.rewrite import TOLERANCE

logger = logging.getLogger(__name__)

NUM_TOKENS = 13

# What is gained must be worth a packed copy, and stand out from the noise of a few timings.
MIN_SPEEDUP = 1.1
NUM_TIMINGS = 5

Linear = Callable[[torch.Tensor], torch.Tensor]


class OneDnnLinear:
    """Computes what an `nn.Linear` computes, from its packed weight.

    Raises:
        AttributeError: this version of torch has no such operation.
        RuntimeError: oneDNN cannot do it for this type on this CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, None)
        self._bias = linear.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]"""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return y


@torch.inference_mode()
def pack_linears(model: Any, mapped: MappedWeights) -> None:
    """Pack the linear layers of a model on the CPU that compute the same, packed, in less time.

    Their own weights are dropped one by one, as they are packed. A weight that is used elsewhere
    too, as by a last layer that shares the embedding's, is kept: the copy buys what is often the
    slowest layer, and of the original a lookup touches few rows; the rest of it goes back to the
    file it is mapped from.

    Args:
        mapped: takes back the pages of weights that are not needed any more.
    """
    mkldnn: Any = torch.backends.mkldnn
    if not mkldnn.is_available():
        return
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    token_ids = torch.arange(NUM_TOKENS).remainder(vocab_size)[None]
    with record_calls(model) as recording:
        model(input_ids=token_ids, use_cache=False)
    num_users = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    # By shape, type and whether there is a bias.
    is_faster: dict[tuple[torch.Size, torch.dtype, bool], bool] = {}
    num_packed = num_linears = 0
    for module in model.modules():
        if module not in recording or not _is_plain(module):
            continue
        num_linears += 1
        weight = module.weight
        kind = (weight.shape, weight.dtype, module.bias is None)
        packed = _packed(module, recording[module]) if is_faster.get(kind, True) else None
        if packed is None:
            continue
        if kind not in is_faster:
            (x,) = recording[module].args
            is_faster[kind] = _takes_less(packed, module, x.reshape(-1, x.shape[-1])[:1])
        if is_faster[kind]:
            module.forward = packed
            mapped.release(weight)
            if num_users[weight] == 1:
                module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
            num_packed += 1
    logger.info("%d of %d linear layers packed by oneDNN", num_packed, num_linears)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer, and all that calling it does is to call its own forward
    once: what others have hung on it may want its weight."""
    return (
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in TOLERANCE
    )


def _packed(linear: nn.Linear, call: Call) -> OneDnnLinear | None:
    """`linear`, packed, if that computes what it computed in `call`."""
    if len(call.args) != 1 or call.kwargs:
        return None
    try:
        packed = OneDnnLinear(linear)
        error = relative_error(packed(*call.args), call.output)
    except (AttributeError, RuntimeError) as reason:
        logger.debug("oneDNN cannot pack %s: %s", linear, reason)
        return None
    return packed if error <= TOLERANCE[linear.weight.dtype] else None


def _takes_less(packed: Linear, plain: Linear, x: torch.Tensor) -> bool:
    """Whether `packed` is worth its memory. In turns, and the best of each: whatever else runs on
    the machine can only add."""
    best = {packed: float("inf"), plain: float("inf")}
    for _ in range(NUM_TIMINGS):
        for linear in best:
            start = time.perf_counter()
            linear(x)
            best[linear] = min(best[linear], time.perf_counter() - start)
    return best[packed] * MIN_SPEEDUP <= best[plain]
