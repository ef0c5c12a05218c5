"""The kernels as functions of torch tensors.

Shapes and types are checked when something is packed or allocated, once; a call costs a few
microseconds and checks only what would read or write beyond a tensor. All results are the same,
bit for bit, whatever else stands in the batch, however a prompt is cut into chunks, and on any
number of threads.

What a step needs again and again (a layer's weights, its cache, the tables of the step) lies in
small C structures made beforehand, so that a call passes few arguments.
"""

import ctypes
from ctypes import c_bool, c_double, c_float, c_int, c_int32, c_int64, c_void_p

import numpy as np
import numpy.typing as npt
import torch

from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.norm import NormWeight
from footplate.backend.kernels.words import dense, rows_of


class Kernels:
    """The functions of one loaded library; see `build.load`. Those with an underscore are for the
    packed layers of this folder."""

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

    def rms_norm(self, x: torch.Tensor, norm: NormWeight) -> torch.Tensor:
        """Root mean square norm (Zhang and Sennrich 2019) over the last dimension.

        Args:
            x: [..., size], in the type of the weight.
        """
        size = norm.size
        assert x.shape[-1] == size and x.dtype is norm.dtype
        y = torch.empty(x.shape, dtype=x.dtype)
        x, stride = rows_of(x)
        num_rows = y.numel() // size
        self._rms_norm(norm.type, norm.address, x.data_ptr(), stride, y.data_ptr(), num_rows, size)
        return y

    def rope_and_cache(
        self,
        cache: LayerPages,
        step: StepTables,
        qkv: torch.Tensor,
        num_heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: NormWeight | None = None,
        key_norm: NormWeight | None = None,
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
        self, cache: LayerPages, step: StepTables, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write keys and values to their slots. Numbers that are not finite are replaced.

        Args:
            key: [num_tokens, num_kv_heads, key_size]; heads may be strided, as in `value`.
            value: [num_tokens, num_kv_heads, value_size].
        """
        assert key.shape == (step.num_tokens, cache.num_kv_heads, cache.key_size)
        assert value.shape == (step.num_tokens, cache.num_kv_heads, cache.value_size)
        assert key.dtype is value.dtype is cache.dtype
        key, value = dense(key), dense(value)
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
        cache: LayerPages,
        step: StepTables,
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
        query = dense(query)
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
        logits = dense(logits)
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
