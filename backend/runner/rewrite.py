"""Puts our kernels under a transformers model, module by module, each one verified.

What a module looks like suggests a replacement; what decides is that the replacement computes
what the original computed, on the inputs that a recorded forward of the whole model gave it. So an
unknown subclass with an extra multiplier is left as it was, and nothing else is needed to be safe
with architectures that nobody here has heard of.

Weights are packed one layer after another, and the originals are dropped as they are packed: a
start needs little more memory than the packed weights. Quantisation comes after verification,
which it would blur: what is quantised is a replacement that was right before.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from footplate.backend.kernels.decoder_layer import DecoderLayer
from footplate.backend.kernels.experts import PackedExperts
from footplate.backend.kernels.linear import Activation, PackedGatedMLP, PackedLinear, Quantization
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.attention_backend import (
    AttentionBackend,
    AttentionOptions,
    LayerShape,
)
from footplate.backend.runner.direct_forward import DirectForward, direct_forward_of
from footplate.backend.runner.fused_layer import PROJECTIONS, FusedLayer, looks_fusible
from footplate.backend.runner.mapped_weights import MappedWeights
from footplate.backend.runner.packed_experts import (
    activation_of,
    drop_weights,
    experts_match,
    looks_like_experts,
    pack_experts,
)
from footplate.backend.runner.packed_router import apart, looks_like_router, pack_router
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.probe import short_batch
from footplate.backend.runner.recording import Recording, record_calls, relative_error
from footplate.backend.runner.shared_weights import SharedWeights
from footplate.backend.runner.whole_vectors import in_whole_vectors

logger = logging.getLogger(__name__)

# Relative root mean square error. Another order of summation gives 1e-6 in float32; bfloat16
# rounds each result to 2e-3, and a layer has several roundings behind one another.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


# What one rounding does to a sum, relative to it.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}

# How families round an RMSNorm: (offset of the weight, rounding before the weight). See NormWeight.
NORM_FAMILIES = ((0.0, True), (1.0, False), (0.0, False))

ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}

# Outputs of a linear layer that are packed at a time. The last layer may be the largest matrix of
# the model, and memory should hold it once.
PIECE_OUTPUTS = 4096

# What eight bits per weight do to an embedding, with room: 0.7 % where weights are normal.
QUANTISED_EMBEDDING_ERROR = 0.05

# A matrix with so few outputs per input, such as the router of experts, is a small part of the
# weights, and errors in it decide between experts.
FEW_OUTPUTS = 1 / 8

LINEAR = (nn.Linear, Conv1D)
PACKED = (PackedLinear, PackedGatedMLP, PackedExperts, FusedLayer)

# A tensor takes whole pages of shared memory.
MIN_SHARED_BYTES = 2**16

Replacement = Callable[..., torch.Tensor]


def rewrite_model(
    model: Any,
    kernels: Kernels,
    backend: AttentionBackend[Any, Any],
    shapes: Mapping[int, LayerShape],
    *,
    block_size: int,
    max_model_len: int,
    mapped: MappedWeights,
    quantization: Quantization | None = None,
    shared: SharedWeights | None = None,
) -> DirectForward | None:
    """Put `kernels` under a model that runs on `backend`.

    Args:
        shapes: what each layer caches, by layer index.
        max_model_len: positions beyond it never come.
        mapped: takes back the pages of weights that are not needed any more.
        quantization: of the linear layers; "int4" leaves the last one, whose errors are those
            of the logits, with 8 bits.
        shared: where packed weights go that others may use; sealed afterwards.

    Returns:
        What computes the same logits as the rewritten model, if every part of it is ours.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    batch, num_blocks = short_batch(vocab_size, block_size, max_model_len)
    paged = PagedModel(model, backend, num_blocks, shapes)
    with record_calls(model) as recording, mapped.released_after_use(model):
        paged.forward(batch)

    def in_step(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        with paged.step(batch):
            return call()

    rewriter = Rewriter(
        kernels, model, recording, paged.options, in_step, mapped, quantization, shared
    )
    rewriter.run()
    if shared is not None:
        shared.seal()
    logger.info("on %s kernels: %s", kernels.instruction_set, dict(rewriter.num_replaced))
    if rewriter.left_alone:
        logger.info("left as they were, for they compute otherwise: %s", rewriter.left_alone)
    direct = direct_forward_of(model, rewriter.head)
    if direct is not None:
        expected = paged.forward(batch)
        got = PagedModel(model, backend, num_blocks, shapes, direct).forward(batch)
        if not torch.equal(got, expected):
            direct = None
    return direct


class Rewriter:
    """Replaces modules of one model.

    Args:
        recording: one forward of the whole model, through the paged path.
        options: how each layer attends.
        in_step: calls a function as a part of the recorded step, so that attention finds its
            cache.
        mapped: takes back the pages of weights that are not needed any more.
        quantization: see `rewrite_model`.
        shared: see `rewrite_model`.

    Attributes:
        num_replaced: modules, by kind.
        head: what was put in the place of the last layer, if anything was.
        left_alone: names of modules that look like one of ours and compute something else.
    """

    def __init__(
        self,
        kernels: Kernels,
        model: Any,
        recording: Recording,
        options: Mapping[int, AttentionOptions],
        in_step: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
        mapped: MappedWeights,
        quantization: Quantization | None,
        shared: SharedWeights | None = None,
    ) -> None:
        self.num_replaced: Counter[str] = Counter()
        self.head: PackedLinear | None = None
        self.left_alone: list[str] = []
        self._kernels = kernels
        self._model = model
        self._recording = recording
        self._options = options
        self._in_step = in_step
        self._quantization = quantization
        self._tolerance = TOLERANCE[model.dtype]
        self._mapped = mapped
        self._shared = shared
        self._done: set[nn.Module] = set()

    @torch.inference_mode()
    def run(self) -> None:
        """Replace all that can be replaced, the largest structures first."""
        for looks_right, replace in (
            (_is_fusible, self._replace_layer),
            (_looks_gated, self._replace_mlp),
            (looks_like_experts, self._replace_experts),
            (self._looks_like_router, self._replace_router),
            (_looks_like_norm, self._replace_norm),
            (_is_linear, self._replace_linear),
            (_is_activation, self._replace_activation),
        ):
            for name, module in self._model.named_modules():
                if module in self._done or not looks_right(module):
                    continue
                if module not in self._recording:
                    continue  # not part of a forward, or not called as a module
                if self._try(replace, module):
                    self.num_replaced[type(module).__name__] += 1
                else:
                    self.left_alone.append(name)
        self._share_embedding()
        self._share_converted_weights()

    @staticmethod
    def _try(replace: Callable[[Any], bool], module: nn.Module) -> bool:
        # A module that only looks like one of ours may have anything inside, and then building or
        # calling what should stand in for it fails. It is installed last.
        try:
            return replace(module)
        except Exception:
            logger.debug("%s is left alone", type(module).__name__, exc_info=True)
            return False

    def _install(self, module: nn.Module, replacement: Replacement) -> None:
        """Make `module` call `replacement`, and drop the weights that were packed for it."""
        if self._shared is not None and isinstance(replacement, PACKED):
            replacement.move(self._shared.share)
        module.forward = replacement
        for part in module.modules():
            self._done.add(part)
            if isinstance(part, LINEAR) and part.weight is not self._tied_weight():
                self._mapped.release(part.weight)
                part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)

    def _matches(self, module: nn.Module, replacement: Replacement) -> bool:
        call = self._recording[module]
        got = self._in_step(lambda: replacement(*call.args, **call.kwargs))
        return relative_error(got, call.output) <= self._tolerance

    # ---- leaves

    def _replace_linear(self, module: Any) -> bool:
        weight = _weight_of(module)
        quantization = self._quantization_of(module, *weight.shape)
        # Is it what it seems to be? A piece is enough to see.
        some = slice(0, PIECE_OUTPUTS)
        bias = None if module.bias is None else module.bias[some]
        piece = PackedLinear(self._kernels, weight[some], bias)
        call = self._recording[module]
        if relative_error(piece(*call.args), call.output[..., some]) > self._tolerance:
            return False
        packed = piece
        if quantization or piece.n < len(weight):
            packed = PackedLinear(
                self._kernels,
                torch.split(weight, PIECE_OUTPUTS),
                module.bias,
                quantization,
                on_packed=self._mapped.release,
            )
        if module is self._model.get_output_embeddings():
            self.head = packed
        self._install(module, packed if packed.n > 1 else apart(packed))
        return True

    def _quantization_of(self, module: nn.Module, n: int, k: int) -> Quantization | None:
        if n <= FEW_OUTPUTS * k:
            return None
        if self._quantization and module is self._model.get_output_embeddings():
            return "int8"
        return self._quantization

    def _replace_activation(self, module: nn.Module) -> bool:
        replacement = partial(in_whole_vectors, module.forward)
        if not self._matches(module, replacement):
            return False
        self._install(module, replacement)
        return True

    def _replace_norm(self, module: nn.Module) -> bool:
        norm = self._norm_of(module)
        if norm is None:
            return False
        self._install(module, lambda x: self._kernels.rms_norm(x, norm))
        return True

    def _norm_of(self, module: nn.Module) -> NormWeight | None:
        """The norm that computes what `module` computed, whichever family it is of."""
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if weight is None or epsilon is None or weight.dtype is not self._model.dtype:
            return None
        best, least = None, self._tolerance
        for offset, rounds_first in NORM_FAMILIES:
            norm = NormWeight(weight, float(epsilon), offset, rounds_first)
            call = self._recording[module]
            error = relative_error(self._kernels.rms_norm(call.args[0], norm), call.output)
            if error <= least:
                best, least = norm, error
        return best

    def _replace_mlp(self, module: nn.Module) -> bool:
        mlp = self._mlp_of(module)
        if mlp is None or not self._matches(module, mlp):
            return False
        if self._quantization:
            mlp = self._mlp_of(module, self._quantization)
            assert mlp
        self._install(module, mlp)
        return True

    def _mlp_of(
        self, module: Any, quantization: Quantization | None = None
    ) -> PackedGatedMLP | None:
        activation = ACTIVATIONS.get(type(module.act_fn).__name__)
        if activation is None:
            return None
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        return PackedGatedMLP(
            self._kernels,
            gate.weight,
            up.weight,
            PackedLinear(self._kernels, down.weight, down.bias, quantization),
            activation,
            gate.bias,
            up.bias,
            quantization,
        )

    # ---- mixtures of experts

    def _replace_experts(self, module: Any) -> bool:
        activation = activation_of(module, ACTIVATIONS)
        if activation is None:
            return False
        packed = pack_experts(self._kernels, module, activation)
        if not experts_match(packed, module, self._recording[module], self._tolerance):
            return False
        if self._quantization:
            packed = pack_experts(self._kernels, module, activation, self._quantization)
        for weight in module.parameters(recurse=False):
            self._mapped.release(weight)
        self._install(module, packed)
        drop_weights(module)
        return True

    def _looks_like_router(self, module: nn.Module) -> bool:
        return module in self._recording and looks_like_router(self._recording[module])

    def _replace_router(self, module: nn.Module) -> bool:
        return pack_router(self._kernels, module, self._recording[module], self._tolerance)

    # ---- whole layers

    def _replace_layer(self, layer: Any) -> bool:
        parts = (
            layer.input_layernorm,
            layer.self_attn,
            layer.post_attention_layernorm,
            layer.mlp,
        )
        if any(part not in self._recording for part in parts):
            return False
        fused = self._fused(layer)
        if fused is None or not self._layer_matches(layer, fused):
            return False
        if self._quantization:
            fused = self._fused(layer, self._quantization)
            assert fused
        self._install(layer, fused)
        return True

    def _fused(self, layer: Any, quantization: Quantization | None = None) -> FusedLayer | None:
        attention = layer.self_attn
        head_norms = []
        for name in ("q_norm", "k_norm"):
            module = getattr(attention, name, None)
            norm = None if module is None else self._norm_of(module)
            if module is not None and norm is None:
                return None
            head_norms.append(norm)
        input_norm = self._norm_of(layer.input_layernorm)
        mlp_norm = self._norm_of(layer.post_attention_layernorm)
        mlp = self._mlp_of(layer.mlp, quantization)
        options = self._options.get(attention.layer_idx)
        if input_norm is None or mlp_norm is None or mlp is None or options is None:
            return None
        *qkv, output = [getattr(attention, name) for name in PROJECTIONS]
        if not all(map(DecoderLayer.supports, (mlp.k, mlp.down.k, output.in_features))):
            return None
        return FusedLayer(
            self._kernels,
            attention.layer_idx,
            options,
            input_norm=input_norm,
            qkv=PackedLinear(
                self._kernels,
                [p.weight for p in qkv],
                None if qkv[0].bias is None else [p.bias for p in qkv],
                quantization,
            ),
            query_norm=head_norms[0],
            key_norm=head_norms[1],
            output=PackedLinear(self._kernels, output.weight, output.bias, quantization),
            mlp_norm=mlp_norm,
            mlp=mlp,
        )

    def _layer_matches(self, layer: Any, fused: FusedLayer) -> bool:
        """Attention and MLP are compared by themselves: in the sum with the residual stream,
        which can be a hundred times larger, a wrong one might pass for rounding."""
        whole, attention = self._recording[layer], self._recording[layer.self_attn]
        hidden = whole.args[0] if whole.args else whole.kwargs["hidden_states"]
        positions = whole.kwargs.get("position_embeddings")
        if positions is None or not isinstance(whole.output, torch.Tensor):
            return False
        normed = self._recording[layer.input_layernorm].output
        attended = self._in_step(lambda: fused.attend(normed, positions))
        expected = attention.output[0]
        if relative_error(attended, expected) > self._tolerance:
            return False
        if not self._matches(layer.mlp, fused.mlp):
            return False
        got = self._in_step(lambda: fused(*whole.args, **whole.kwargs))
        allowed = self._tolerance * _rms(whole.output - hidden)
        allowed += 2 * ROUNDING[hidden.dtype] * _rms(hidden)
        return got.shape == whole.output.shape and _rms(got - whole.output) <= allowed

    # ---- the weight that a last layer shares with the embedding

    def _tied_weight(self) -> nn.Parameter | None:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if head is None or embedding is None or head.weight is not embedding.weight:
            return None
        weight: nn.Parameter = embedding.weight
        return weight

    def _share_embedding(self) -> None:
        """Look embeddings up in the packed last layer, instead of keeping the weight twice."""
        embedding = self._model.get_input_embeddings()
        is_tied = self._tied_weight() is not None
        if self.head is None or not is_tied or type(embedding) is not nn.Embedding:
            return
        call = self._recording[embedding]
        error = relative_error(self.head.rows(call.args[0]), call.output)
        if error <= (QUANTISED_EMBEDDING_ERROR if self._quantization else 0):
            self._install(embedding, self.head.rows)
            self._mapped.release(embedding.weight)
            empty = nn.Parameter(embedding.weight.new_empty(0), requires_grad=False)
            embedding.weight = self._model.get_output_embeddings().weight = empty

    def _share_converted_weights(self) -> None:
        """What is left of the model is mapped from its files, which all who map them share, unless
        it was converted to another type."""
        if self._shared is None:
            return
        for weight in self._model.parameters():
            is_large = weight.nbytes >= MIN_SHARED_BYTES and weight.is_contiguous()
            if is_large and not self._mapped.holds(weight):
                weight.data = self._shared.share(weight.data)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in LINEAR


def _weight_of(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """[n, k]; GPT-2's convolution of width one is a linear layer that keeps it transposed."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    is_one = home in ("transformers.activations", "torch.nn.modules.activation")
    return is_one and not any(True for _ in module.parameters())


def _looks_like_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _looks_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    linears = [getattr(module, name, None) for name in names]
    return hasattr(module, "act_fn") and all(type(linear) is nn.Linear for linear in linears)


def _is_fusible(module: nn.Module) -> bool:
    return looks_fusible(module) and _looks_gated(module.get_submodule("mlp"))


def _rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())
