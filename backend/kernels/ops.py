"""The kernels as functions of torch tensors.

Shapes and types are checked when something is packed or allocated, once; a call costs a few
microseconds and checks only what would read or write beyond a tensor. All results are the same,
bit for bit, whatever else stands in the batch, however a prompt is cut into chunks, and on any
number of threads.

What a step needs again and again (a layer's weights, its cache, the tables of the step) lies in
small C structures made beforehand, so that a call passes few arguments.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from footplate.backend.kernels.large_memory import zeroed

PAGE_TOKENS = 16
LANES = 16

# See `Type` in words.h, `Format` and `Activation` in linear.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}
Quantization = Literal["int8", "int4"]
FORMATS: dict[Quantization | None, int] = {None: 0, "int8": 1, "int4": 2}
Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
ACTIVATIONS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "swiglu_oai": 3}


class _LinearLayer(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("type", c_int32),
        ("format", c_int32),
        ("activation", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("epsilon", c_float),
        ("weight_offset", c_float),
        ("rounds_before_weight", c_int32),
    )


class _LayerCache(ctypes.Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("page_stride", c_int64),
        ("num_kv_heads", c_int32),
        ("key_size", c_int32),
        ("value_size", c_int32),
        ("type", c_int32),
    )


class _StepTables(ctypes.Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("num_tokens", c_int32),
        ("num_requests", c_int32),
        ("table_stride", c_int32),
        ("pages_per_block", c_int32),
    )


class DecoderLayerStruct(ctypes.Structure):
    """`DecoderLayer` of decoder_layer.h."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("scale", c_float),
        ("window", c_int32),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("output", c_void_p),
        ("mlp_norm", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
    )


class Kernels:
    """The functions of one loaded library; see `build.load`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = c_void_p, c_int64
        library.footplate_instruction_set.restype = ctypes.c_char_p
        self.instruction_set: str = library.footplate_instruction_set().decode()

        def function(
            name: str, *arguments: type, result: type | None = None
        ) -> "ctypes._NamedFuncPointer":
            found = library[f"footplate_{name}"]
            found.argtypes = arguments
            found.restype = result
            return found

        self._pack = function(
            "pack", c_int32, c_int32, pointer, size, c_int, c_int, pointer, c_int, c_int, c_int
        )
        self._unpack_rows = function("unpack_rows", pointer, pointer, pointer, c_int, result=c_bool)
        self._linear = function("linear", pointer, pointer, size, pointer, pointer, c_bool, c_int)
        self._experts = function(
            "experts",
            *(c_int32, pointer, c_int, pointer, size, pointer, pointer, c_int32),
            *(pointer, pointer, c_int, c_int),
            result=c_bool,
        )
        self._rms_norm = function(
            "rms_norm", c_int32, pointer, pointer, size, pointer, c_int, c_int
        )
        self._rope_and_cache = function(
            "rope_and_cache",
            *(pointer, pointer, pointer, size, c_int, pointer, pointer, c_int, pointer, pointer),
        )
        self._write_kv = function(
            "write_kv", pointer, pointer, pointer, size, size, pointer, size, size
        )
        self._paged_attention = function(
            "paged_attention",
            *(pointer, pointer, pointer, size, size, pointer, c_int),
            *(c_float, c_int, c_float, pointer),
        )
        self._decoder_layer = function("decoder_layer", *7 * [pointer], c_int)
        self._sample = function("sample", pointer, size, pointer, pointer, c_int, c_int)
        self._log_sum_exp = function("log_sum_exp", pointer, c_int, result=c_double)

    def rms_norm(self, x: torch.Tensor, norm: "NormWeight") -> torch.Tensor:
        """Root mean square norm (Zhang and Sennrich 2019) over the last dimension.

        Args:
            x: [..., size], in the type of the weight.
        """
        size = norm.size
        assert x.shape[-1] == size and x.dtype is norm.dtype
        y = torch.empty(x.shape, dtype=x.dtype)
        x, stride = _rows(x)
        num_rows = y.numel() // size
        self._rms_norm(norm.type, norm.address, x.data_ptr(), stride, y.data_ptr(), num_rows, size)
        return y

    def rope_and_cache(
        self,
        cache: "LayerPages",
        step: "StepTables",
        qkv: torch.Tensor,
        num_heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: "NormWeight | None" = None,
        key_norm: "NormWeight | None" = None,
    ) -> None:
        """All that stands between a fused projection and attention: norms of single heads,
        rotary positions (Su et al. 2021), writing keys and values to the cache.

        Args:
            qkv: [num_tokens, num_heads * key_size + num_kv_heads * (key_size + value_size)],
                changed in place: its queries are ready for `paged_attention` afterwards.
            cos, sin: [num_tokens, rotary_size], contiguous, in the type of `qkv`; the first
                `rotary_size` numbers of each head are rotated, by halves.
        """
        num_tokens, rotary_size = step.num_tokens, cos.shape[-1]
        assert rotary_size <= cache.key_size
        assert qkv.numel() == num_tokens * cache.row_size(num_heads) and qkv.is_contiguous()
        assert cos.numel() == sin.numel() == num_tokens * rotary_size
        assert qkv.dtype is cos.dtype is sin.dtype is cache.dtype
        self._rope_and_cache(
            cache.address,
            step.address,
            qkv.data_ptr(),
            cache.row_size(num_heads),
            num_heads,
            cos.data_ptr(),
            sin.data_ptr(),
            rotary_size,
            None if query_norm is None else query_norm.address,
            None if key_norm is None else key_norm.address,
        )

    def write_kv(
        self, cache: "LayerPages", step: "StepTables", key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write keys and values to their slots. Numbers that are not finite are replaced.

        Args:
            key: [num_tokens, num_kv_heads, key_size]; heads may be strided, as in `value`.
            value: [num_tokens, num_kv_heads, value_size].
        """
        assert key.shape == (step.num_tokens, cache.num_kv_heads, cache.key_size)
        assert value.shape == (step.num_tokens, cache.num_kv_heads, cache.value_size)
        assert key.dtype is value.dtype is cache.dtype
        key, value = _dense(key), _dense(value)
        self._write_kv(
            cache.address,
            step.address,
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
        )

    def paged_attention(
        self,
        cache: "LayerPages",
        step: "StepTables",
        query: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention over what is in the cache, this step's tokens included.

        Args:
            query: [num_tokens, num_heads, key_size]; heads may be strided.
            window, softcap: see `AttentionOptions` of the runner.
            sinks: [num_heads], float32, contiguous.

        Returns:
            [num_tokens, num_heads, value_size].
        """
        num_tokens, num_heads, key_size = query.shape
        assert num_tokens == step.num_tokens and key_size == cache.key_size
        assert num_heads % cache.num_kv_heads == 0 and query.dtype is cache.dtype
        if sinks is not None:
            assert sinks.dtype is torch.float32 and sinks.numel() == num_heads
        query = _dense(query)
        out = torch.empty((num_tokens, num_heads, cache.value_size), dtype=query.dtype)
        self._paged_attention(
            cache.address,
            step.address,
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            out.data_ptr(),
            num_heads,
            scale,
            window or 0,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        return out

    def sample(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Choose one token per row, as `Sampler` of the runner defines it.

        Args:
            logits: [num_rows, vocab], float32. Rows with a temperature hold their probabilities
                afterwards, those whose logits are no distribution anything.
            draws: [num_rows, 5], float64, contiguous: temperature (0 is greedy, a negative one
                skips the row), min_p, top_k (0 keeps all), top_p, and the noise in [0, 1).

        Returns:
            [num_rows], int64; -1 where the logits are no distribution, or were skipped.
        """
        num_rows, vocab = logits.shape
        assert logits.dtype is torch.float32 and vocab > 0
        assert draws.shape == (num_rows, 5) and draws.dtype is torch.float64
        assert draws.is_contiguous()
        logits = _dense(logits)
        assert num_rows < 2 or logits.stride(0) >= vocab
        tokens = torch.empty(num_rows, dtype=torch.int64)
        self._sample(
            *(logits.data_ptr(), logits.stride(0), draws.data_ptr(), tokens.data_ptr()),
            *(num_rows, vocab),
        )
        return tokens

    def log_sum_exp(self, row: npt.NDArray[np.float32]) -> float:
        """The function of this name in `logits.logprobs`, which rounds differently in its last
        bits.

        Args:
            row: [vocab], contiguous.
        """
        assert row.dtype == np.float32 and row.ndim == 1 and row.flags.c_contiguous
        total: float = self._log_sum_exp(row.ctypes.data, len(row))
        return total


Move = Callable[[torch.Tensor], torch.Tensor]


class PackedLinear:
    """A linear layer, y = x w^T + bias, packed for the micro-kernel.

    Keeps nothing of the tensors it is made from.

    Args:
        weights: [n, k] each, float32 or bfloat16; their outputs stand behind one another, as in a
            fused projection to queries, keys and values.
        biases: [n] each, all or none.
        quantization: "int8" keeps weights in 8 bits with one scale per output, "int4" in 4 bits
            with one scale per output and 128 inputs. Both round activations to 8 bits, each row
            for itself, or with "int4" each 128 numbers of a row.
        on_packed: called with each of `weights` when nothing more is wanted of it.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: torch.Tensor | Sequence[torch.Tensor],
        biases: torch.Tensor | Sequence[torch.Tensor] | None = None,
        quantization: Quantization | None = None,
        on_packed: Callable[[torch.Tensor], None] = lambda part: None,
    ) -> None:
        parts = [weights] if isinstance(weights, torch.Tensor) else list(weights)
        if any(len(part) % LANES for part in parts[:-1]):
            parts = [torch.cat(parts)]  # a group of lanes cannot belong to two matrices
        n, k, dtype = sum(len(part) for part in parts), parts[0].shape[1], parts[0].dtype
        num_groups = -(-n // LANES)
        packed = zeroed((num_groups, _group_words(k, dtype, quantization)), torch.int32)
        first_group = 0
        for part in parts:
            assert part.shape[1] == k and part.dtype is dtype
            _pack(kernels, part, packed, quantization, first_group, 1, 1)
            first_group += len(part) // LANES
            on_packed(part)
        self._kernels = kernels
        self._layer = _Layer(kernels, packed, biases, n, k, dtype, quantization)
        self.n, self.k, self.dtype = n, k, dtype
        self.address = self._layer.address

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return self._layer.packed.nbytes

    def move(self, move: Move) -> None:
        """Have the packed weights, int32, in the memory that `move` gives for them, which holds
        the same."""
        self._layer.move(move)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, wide: bool = False
    ) -> torch.Tensor:
        """[..., k] to [..., n].

        Args:
            residual: [..., n], contiguous, added to the rounded result.
            wide: give the result in float32, after rounding it as ever: for logits.
        """
        return self._layer(x, residual, wide)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [*ids.shape, k]: an embedding that shares the weights of a last
        layer needs no copy of its own.

        Args:
            ids: int64.

        Raises:
            IndexError: an id is negative, or not less than n.
        """
        assert ids.dtype is torch.int64
        ids = ids.contiguous()
        y = torch.empty((*ids.shape, self.k), dtype=self.dtype)
        layer = self._layer.address
        if not self._kernels._unpack_rows(layer, ids.data_ptr(), y.data_ptr(), ids.numel()):
            raise IndexError(f"a packed weight has rows 0 to {self.n - 1}")
        return y


class PackedGatedMLP:
    """A gated feed-forward layer, y = down(activation(gate(x)) * up(x)) (Shazeer 2020), in two
    calls.

    Args:
        gate, up: [n, k], with biases [n] or none.
        down: packed already.
        activation: "swiglu_oai" is (up + 1) * gate * sigmoid(alpha * gate), of gpt-oss.
        quantization: of gate and up, as in `PackedLinear`.
        limit: clamps gate from above and up on both sides.
    """

    def __init__(
        self,
        kernels: Kernels,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: PackedLinear,
        activation: Activation = "silu",
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        quantization: Quantization | None = None,
        limit: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        assert limit is None or limit > 0
        assert gate.shape == up.shape and gate.dtype is up.dtype is down.dtype
        assert (gate_bias is None) == (up_bias is None)
        n, k = gate.shape
        # Panels of two groups of each matrix; zeros where a matrix has no group left.
        num_groups = 4 * -(-n // (2 * LANES))
        packed = zeroed((num_groups, _group_words(k, gate.dtype, quantization)), torch.int32)
        _pack(kernels, gate, packed, quantization, 0, 2, 4)
        _pack(kernels, up, packed, quantization, 2, 2, 4)
        biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
        self._layer = _Layer(
            kernels, packed, biases, n, k, gate.dtype, quantization, activation, limit, alpha
        )
        self.hidden_size, self.k, self.dtype = n, k, gate.dtype
        self.down = down
        self.address = self._layer.address

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return self._layer.packed.nbytes + self.down.nbytes

    def move(self, move: Move) -> None:
        """See `PackedLinear.move`."""
        self._layer.move(move)
        self.down.move(move)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., k] to [..., outputs of `down`]; `residual` is added as by `PackedLinear`."""
        return self.down(self._layer(x), residual)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """activation(gate(x)) * up(x): [..., k] to [..., hidden_size]."""
        return self._layer(x)


class PackedExperts:
    """The experts of a mixture (Shazeer et al. 2017), each over the rows routed to it, in one call.

    Args:
        experts: of the same sizes and type; between their layers, whole words.
    """

    def __init__(self, kernels: Kernels, experts: Sequence[PackedGatedMLP]) -> None:
        first = experts[0]
        self.k, self.n, self.dtype = first.k, first.down.n, first.dtype
        assert first.hidden_size * self.dtype.itemsize % 4 == 0
        for expert in experts:
            assert (expert.k, expert.down.n, expert.dtype) == (self.k, self.n, self.dtype)
            assert expert.hidden_size == expert.down.k == first.hidden_size
        self._call = kernels._experts
        self._experts = list(experts)
        addresses = [address for e in experts for address in (e.address, e.down.address)]
        self._addresses = (c_void_p * len(addresses))(*addresses)

    def __len__(self) -> int:
        return len(self._experts)

    @property
    def nbytes(self) -> int:
        """Memory of the packed weights."""
        return sum(expert.nbytes for expert in self._experts)

    def move(self, move: Move) -> None:
        """See `PackedLinear.move`."""
        for expert in self._experts:
            expert.move(move)

    def __call__(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it, in the order of its slots.

        Args:
            x: [num_tokens, k].
            index: [num_tokens, top_k], int64; an expert per slot.
            weights: [num_tokens, top_k]; results are rounded to their type, and their sum to
                that of `x`.

        Returns:
            [num_tokens, n].

        Raises:
            IndexError: there is no such expert.
        """
        num_tokens, top_k = index.shape
        assert x.shape == (num_tokens, self.k) and x.dtype is self.dtype
        assert weights.shape == index.shape and index.dtype is torch.int64
        if weights.dtype is not self.dtype:
            weights = weights.float()
        x, stride = _rows(x)
        index, weights = index.contiguous(), weights.contiguous()
        computed = torch.empty((num_tokens * top_k, self.n), dtype=self.dtype)
        y = torch.empty((num_tokens, self.n), dtype=self.dtype)
        if not self._call(
            *(TYPES[self.dtype], self._addresses, len(self._experts), x.data_ptr(), stride),
            *(index.data_ptr(), weights.data_ptr(), TYPES[weights.dtype]),
            *(computed.data_ptr(), y.data_ptr(), num_tokens, top_k),
        ):
            raise IndexError(f"there are experts 0 to {len(self._experts) - 1}")
        return y


class _Layer:
    """What linear layers and gated ones share: packed weights, and one call of the kernel."""

    def __init__(
        self,
        kernels: Kernels,
        packed: torch.Tensor,
        biases: torch.Tensor | Sequence[torch.Tensor] | None,
        n: int,
        k: int,
        dtype: torch.dtype,
        quantization: Quantization | None,
        activation: Activation | None = None,
        limit: float | None = None,
        alpha: float = 1.0,
    ) -> None:
        self.packed = packed
        self.n, self.k, self.dtype = n, k, dtype
        self._call = kernels._linear
        self._bias = None
        if biases is not None:
            parts = [biases] if isinstance(biases, torch.Tensor) else list(biases)
            self._bias = torch.cat([part.detach() for part in parts])
            assert self._bias.shape == (n if activation is None else 2 * n,)
            assert self._bias.dtype is dtype
        self._struct = _LinearLayer(
            packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            n,
            k,
            TYPES[dtype],
            FORMATS[quantization],
            ACTIVATIONS[activation],
            limit or 0.0,
            alpha,
        )
        self.address = ctypes.addressof(self._struct)

    def move(self, move: Move) -> None:
        moved = move(self.packed)
        assert moved.shape == self.packed.shape and moved.is_contiguous()
        self.packed = moved
        self._struct.weights = moved.data_ptr()

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, wide: bool = False
    ) -> torch.Tensor:
        assert x.shape[-1] == self.k and x.dtype is self.dtype
        y = torch.empty((*x.shape[:-1], self.n), dtype=torch.float32 if wide else self.dtype)
        x, stride = _rows(x)
        if residual is not None:
            assert residual.numel() == y.numel() and residual.is_contiguous()
            assert residual.dtype is self.dtype
        self._call(
            self.address,
            x.data_ptr(),
            stride,
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            wide,
            y.numel() // self.n,
        )
        return y


class NormWeight:
    """The weight of an RMSNorm, and how its family rounds: Llama as by default; Gemma with
    `offset` 1 and one rounding at the end; OLMo 2 with one rounding at the end."""

    def __init__(
        self,
        weight: torch.Tensor,
        epsilon: float,
        offset: float = 0.0,
        rounds_before_weight: bool = True,
    ) -> None:
        self.weight = weight.detach().contiguous()
        self.size = self.weight.numel()
        self.dtype = weight.dtype
        self.type = TYPES[weight.dtype]
        self._norm = _Norm(self.weight.data_ptr(), epsilon, offset, rounds_before_weight)
        self.address = ctypes.addressof(self._norm)


class LayerPages:
    """The cache of one layer, whose layout is told in cache.h.

    Args:
        block_size: tokens in a block as the block pool counts them, a multiple of 16.
        memory: [num_blocks * block_size / 16, page_words], zeroed int32, rows anywhere; by
            default the layer has memory of its own.

    Attributes:
        keys: [num_pages, num_kv_heads, key_words, 16, values per word], a view.
        values: [num_pages, num_kv_heads, 16 / values per word, value_columns, values per word].
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        key_size: int,
        value_size: int,
        dtype: torch.dtype,
        memory: torch.Tensor | None = None,
    ) -> None:
        assert block_size % PAGE_TOKENS == 0
        self.num_kv_heads, self.key_size, self.value_size = num_kv_heads, key_size, value_size
        self.dtype = dtype
        shape = (
            num_blocks * (block_size // PAGE_TOKENS),
            self.page_words(num_kv_heads, key_size, value_size, dtype),
        )
        memory = zeroed(shape, torch.int32) if memory is None else memory
        assert memory.shape == shape and memory.stride(1) == 1 and memory.dtype is torch.int32
        values_per_word, key_words, value_columns = _page_layout(key_size, value_size, dtype)
        num_key_words = num_kv_heads * key_words * PAGE_TOKENS
        keys, values = memory[:, :num_key_words], memory[:, num_key_words:]
        keys = torch.unflatten(keys, 1, (num_kv_heads, key_words, PAGE_TOKENS, 1))
        values = torch.unflatten(
            values, 1, (num_kv_heads, PAGE_TOKENS // values_per_word, value_columns, 1)
        )
        self.keys, self.values = keys.view(dtype), values.view(dtype)
        self._cache = _LayerCache(
            self.keys.data_ptr(),
            self.values.data_ptr(),
            memory.stride(0),
            num_kv_heads,
            key_size,
            value_size,
            TYPES[dtype],
        )
        self.address = ctypes.addressof(self._cache)

    @staticmethod
    def page_words(num_kv_heads: int, key_size: int, value_size: int, dtype: torch.dtype) -> int:
        """32-bit words of the keys and values of 16 tokens, padding included."""
        values_per_word, key_words, value_columns = _page_layout(key_size, value_size, dtype)
        words_per_head = PAGE_TOKENS * key_words + PAGE_TOKENS // values_per_word * value_columns
        return num_kv_heads * words_per_head

    def row_size(self, num_heads: int) -> int:
        """Numbers per token of a fused projection to queries, keys and values."""
        return (num_heads + self.num_kv_heads) * self.key_size + self.num_kv_heads * self.value_size


class StepTables:
    """Where the tokens of one step belong; made once per step, for all layers.

    Args:
        slots: [num_tokens], int64, block id times block size plus offset.
        query_starts: [num_requests + 1], int32, first row of each request.
        context_lens: [num_requests], int32, tokens in the cache after this step.
        block_tables: [num_requests, any], int32, block ids, padded with anything.
        block_size: as in `LayerPages`.
    """

    def __init__(
        self,
        slots: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> None:
        tensors = (slots, query_starts, context_lens, block_tables)
        assert [t.dtype for t in tensors] == [torch.int64, *3 * [torch.int32]]
        assert all(t.is_contiguous() for t in tensors)
        assert len(query_starts) - 1 == len(context_lens) == len(block_tables)
        self.num_tokens = len(slots)
        self._tensors = tensors  # kept alive: the structure has their addresses
        self._tables = _StepTables(
            *(t.data_ptr() for t in tensors),
            self.num_tokens,
            len(context_lens),
            block_tables.shape[1],
            block_size // PAGE_TOKENS,
        )
        self.address = ctypes.addressof(self._tables)


def _page_layout(key_size: int, value_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    values_per_word = 4 // dtype.itemsize
    return values_per_word, -(-key_size // values_per_word), -(-value_size // LANES) * LANES


def _group_words(k: int, dtype: torch.dtype, quantization: Quantization | None) -> int:
    """32-bit words of a group of 16 packed columns; see linear.h and quantised.h."""
    if quantization == "int8":
        return (-(-k // 4) + 1) * LANES
    if quantization == "int4":
        return -(-k // 128) * 17 * LANES
    return -(-k // (4 // dtype.itemsize)) * LANES


def _pack(
    kernels: Kernels,
    weight: torch.Tensor,
    to: torch.Tensor,
    quantization: Quantization | None,
    first: int,
    run: int,
    stride: int,
) -> None:
    """Pack [n, k] into groups of `to`: from the `first` one, `run` of every `stride`."""
    weight = _dense(weight.detach())
    n, k = weight.shape
    assert weight.dtype in TYPES, f"kernels know no {weight.dtype}"
    kernels._pack(
        *(TYPES[weight.dtype], FORMATS[quantization]),
        *(weight.data_ptr(), weight.stride(0), n, k),
        *(to.data_ptr(), first, run, stride),
    )


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it, with nothing between the numbers of its last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x`, or a copy of it, as rows at equal distances of whole words, and that distance in
    numbers. Rows that do not fill their last word are filled up with zero."""
    values_per_word = 4 // x.itemsize
    if rest := x.shape[-1] % values_per_word:
        x = torch.nn.functional.pad(x, (0, values_per_word - rest))
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % values_per_word == 0:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]
