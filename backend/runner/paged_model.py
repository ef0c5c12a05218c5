"""A transformers model whose attention layers use our paged cache.

Architectures come from transformers as they are. The only thing replaced is the attention
function, through the library's own registry; embeddings, rotary variants, norms, routing and
the order of layers stay theirs. A step is one flattened sequence `[1, num_tokens]`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from footplate.backend.runner.attention_backend import (
    AttentionBackend,
    AttentionOptions,
    LayerShape,
)
from footplate.backend.runner.batch import RaggedBatch, to_device

# For a name that has no mask function beside it, transformers builds no mask at all.
ATTENTION_NAME = "footplate"

# Keywords that change nothing about attention in inference. Any other may.
IGNORED_KEYWORDS = frozenset(
    {"dropout", "position_ids", "cache_position", "use_cache", "output_router_logits"}
)

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# The model whose forward is running. Not a keyword argument of that forward: not every
# architecture hands its keyword arguments on to its attention layers.
_running: "PagedModel | None" = None


class PagedModel:
    """Owns the layers' caches and the metadata of the step that is running.

    Attributes:
        shapes: what each layer caches, by layer index.
        options: how each layer attended last, by layer index.
        num_calls: how often attention was called, over all layers and steps.

    Args:
        model: a causal language model; its attention implementation is switched to ours.
        backend: computes attention and allocates what it needs for it.
        num_blocks: of every layer's cache.
        shapes: by layer index. Layers that are not in it get their cache when they are first
            called, which is how shapes are found out.
        direct: computes what the model does, in fewer words: [num_tokens] token ids and positions,
            and the rows whose logits are wanted, to these, in float32.
    """

    def __init__(
        self,
        model: Any,
        backend: AttentionBackend[Any, Any],
        num_blocks: int,
        shapes: Mapping[int, LayerShape] | None = None,
        direct: Forward | None = None,
    ) -> None:
        self._model = model
        self._direct = direct
        self._backend = backend
        self._num_blocks = num_blocks
        self._device = model.device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._step: Any = None
        self.shapes: dict[int, LayerShape] = dict(shapes or {})
        self._caches: dict[int, Any] = backend.allocate(self.shapes, num_blocks)
        self.options: dict[int, AttentionOptions] = {}
        self.num_calls = 0
        AttentionInterface.register(ATTENTION_NAME, _attention_function)
        model.set_attn_implementation(ATTENTION_NAME)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> torch.Tensor:
        """Compute one step.

        Returns:
            [len(batch.logit_rows), vocab], float32. No rows, when none is wanted.
        """
        token_ids = to_device(batch.token_ids, self._device)
        positions = to_device(batch.positions, self._device)
        rows = to_device(batch.logit_rows, self._device)
        options = {"logits_to_keep": rows} if self._keeps_logits else {}
        with self.step(batch):
            if self._direct is not None:
                return self._direct(token_ids, positions, rows)
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                **options,
            )
        logits: torch.Tensor = output.logits[0]
        return (logits if self._keeps_logits else logits[rows]).float()

    @contextmanager
    def step(self, batch: RaggedBatch) -> Iterator[None]:
        """Attention layers that are called within the context take part in this step."""
        global _running
        self._step = self._backend.begin_step(batch)
        _running = self
        try:
            yield
        finally:
            _running = None
            self._step = None

    def layer(self, layer: int) -> tuple[Any, Any]:
        """The running step and a layer's cache, as the backend made them."""
        return self._step, self._caches[layer]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of one layer in the running step; shapes as in `AttentionBackend.attend`."""
        if layer not in self._caches:
            shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], key.dtype)
            self.shapes[layer] = shape
            self._caches |= self._backend.allocate({layer: shape}, self._num_blocks)
        self.options[layer] = options
        self.num_calls += 1
        return self._backend.attend(self._step, self._caches[layer], query, key, value, options)


def running_layer(layer: int) -> tuple[Any, Any]:
    """See `PagedModel.layer`; for modules that were rewritten for one backend."""
    assert _running is not None, "a layer was called outside of a step"
    return _running.layer(layer)


def _attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls.

    Args:
        module: the attention layer; `layer_idx` tells which.
        query: [1, num_heads, num_tokens, head_dim], as key and value.
        attention_mask: None, since transformers makes no mask for us.
        s_aux: attention sinks.

    Returns:
        [1, num_tokens, num_heads, value_size], and no attention weights.

    Raises:
        NotImplementedError: the layer asks for something that paged attention does not know.
    """
    # A mask here is the model's own, such as a choice of keys by an indexer. Ignoring it would
    # give wrong tokens, and only for long prompts.
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} makes its own attention mask")
    for name, argument in others.items():
        if name not in IGNORED_KEYWORDS and argument is not None and argument is not False:
            raise NotImplementedError(f"{type(module).__name__} passes {name} to attention")
    assert _running is not None, "the paged attention function was called outside of a step"
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _running.attend(module.layer_idx, q, k, v, options)[None], None
