// Footplate's kernels for one instruction set: everything that is called from Python.
//
// Compiled on first use for the CPU at hand (build.py), called through ctypes (ops.py, and a file
// beside each header), which has checked all there is to check: tensors arrive as addresses. Every
// function may be called with no rows.
//
//   words.h, simd.h    numbers, and sixteen lanes of them on any CPU
//   tile.h             the micro-kernel
//   linear.h           linear layers, gated ones too
//   quantised.h        the same with weights of 8 and 4 bits
//   experts.h          experts of a mixture, over the rows routed to each
//   norm.h             RMSNorm, rotary positions
//   cache.h            pages of keys and values
//   attention.h        attention over them
//   decoder_layer.h    all of a layer
//   sampling.h         logits become tokens
//   logprobs.h         and are normalised for logprobs
#include "attention.h"
#include "decoder_layer.h"
#include "experts.h"
#include "linear.h"
#include "logprobs.h"
#include "norm.h"
#include "quantised.h"
#include "sampling.h"

namespace {

// Call `body` with a null pointer of the C++ type that `type` stands for.
template <class Body>
void with_type(int32_t type, const Body& body) {
  if (type == BF16)
    body(static_cast<bf16*>(nullptr));
  else
    body(static_cast<float*>(nullptr));
}

template <class Pointer>
using Number = std::remove_pointer_t<Pointer>;

}  // namespace

extern "C" {

const char* footplate_instruction_set() { return simd::name; }

// Pack w[n, k], whose rows are `stride` numbers apart, into some groups of a layer.
void footplate_pack(int32_t type, int32_t format, const void* w, int64_t stride, int n, int k,
                    void* packed, int first_group, int run, int group_stride) {
  with_type(type, [&](auto null) {
    using E = Number<decltype(null)>;
    auto pack_format = format == INT8 ? pack_int8<E> : format == INT4 ? pack_int4<E> : pack<E>;
    pack_format(static_cast<const E*>(w), stride, n, k, static_cast<word*>(packed),
                GroupOrder{first_group, run, group_stride});
  });
}

// Rows of a packed matrix, y[count, k]: what an embedding does that shares its weights with the
// last layer. False, and nothing written, when there is no such row.
bool footplate_unpack_rows(const LinearLayer* layer, const int64_t* ids, void* y, int count) {
  for (int i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= layer->n) return false;
  with_type(layer->type, [&](auto null) {
    using E = Number<decltype(null)>;
    auto unpack_format = layer->format == INT8   ? unpack_int8<E>
                         : layer->format == INT4 ? unpack_int4<E>
                                                 : unpack<E>;
#pragma omp parallel for schedule(static) if (count > 16)
    for (int i = 0; i < count; ++i)
      unpack_format(layer->weights, ids[i], layer->k,
                    static_cast<E*>(y) + static_cast<size_t>(i) * layer->k);
  });
  return true;
}

void footplate_linear(const LinearLayer* layer, const void* x, int64_t x_stride,
                      const void* residual, void* y, bool wide, int m) {
  with_type(layer->type, [&](auto null) {
    using E = Number<decltype(null)>;
    apply(*layer, static_cast<const E*>(x), x_stride, static_cast<const E*>(residual), y, wide, m);
  });
}

// A mixture: y[num_tokens, outputs] from x[num_tokens, inputs], with index and weights
// [num_tokens, top_k]. Weights are in the type of x or in float. False, and nothing written, when
// an index names no expert.
bool footplate_experts(int32_t type, const Expert* experts, int num_experts, const void* x,
                       int64_t x_stride, const int64_t* index, const void* weights,
                       int32_t weights_type, void* computed, void* y, int num_tokens, int top_k) {
  static thread_local Routing routing;
  if (!routing.sort(index, num_tokens * top_k, num_experts)) return false;
  auto layer = [](const LinearLayer* linear, const void* rows, int64_t stride, void* out, int m) {
    footplate_linear(linear, rows, stride, nullptr, out, false, m);
  };
  with_type(type, [&](auto null) {
    using E = Number<decltype(null)>;
    E *of_slots = static_cast<E*>(computed), *of_tokens = static_cast<E*>(y);
    int size = experts[0].down->n;
    compute_experts(experts, routing, static_cast<const E*>(x), x_stride, of_slots, top_k, layer);
    if (weights_type == type)
      add_slots(routing, of_slots, static_cast<const E*>(weights), of_tokens, num_tokens, top_k,
                size);
    else
      add_slots(routing, of_slots, static_cast<const float*>(weights), of_tokens, num_tokens,
                top_k, size);
  });
  return true;
}

void footplate_rms_norm(int32_t type, const Norm* norm, const void* x, int64_t x_stride, void* y,
                        int m, int size) {
  with_type(type, [&](auto null) {
    using E = Number<decltype(null)>;
    rms_norm(*norm, static_cast<const E*>(x), x_stride, static_cast<E*>(y), m, size);
  });
}

void footplate_rope_and_cache(const LayerCache* cache, const StepTables* step, void* qkv,
                              int64_t row_stride, int num_heads, const void* cos, const void* sin,
                              int rotary_size, const Norm* query_norm, const Norm* key_norm) {
  with_type(cache->type, [&](auto null) {
    using E = Number<decltype(null)>;
    rope_and_cache(*cache, *step, static_cast<E*>(qkv), row_stride, num_heads,
                   static_cast<const E*>(cos), static_cast<const E*>(sin), rotary_size,
                   query_norm, key_norm);
  });
}

void footplate_write_kv(const LayerCache* cache, const StepTables* step, const void* key,
                        int64_t key_token_stride, int64_t key_head_stride, const void* value,
                        int64_t value_token_stride, int64_t value_head_stride) {
  with_type(cache->type, [&](auto null) {
    using E = Number<decltype(null)>;
    write_kv(*cache, *step, static_cast<const E*>(key), key_token_stride, key_head_stride,
             static_cast<const E*>(value), value_token_stride, value_head_stride);
  });
}

void footplate_paged_attention(const LayerCache* cache, const StepTables* step, const void* query,
                               int64_t token_stride, int64_t head_stride, void* out,
                               int num_heads, float scale, int window, float softcap,
                               const float* sinks) {
  with_type(cache->type, [&](auto null) {
    using E = Number<decltype(null)>;
    paged_attention(*cache, *step, AttentionOptions{scale, window, softcap, sinks},
                    static_cast<const E*>(query), token_stride, head_stride,
                    static_cast<E*>(out), num_heads);
  });
}

void footplate_decoder_layer(const DecoderLayer* layer, const LayerCache* cache,
                             const StepTables* step, const void* hidden, void* y, const void* cos,
                             const void* sin, int rotary_size) {
  with_type(cache->type, [&](auto null) {
    using E = Number<decltype(null)>;
    decoder_layer(*layer, *cache, *step, static_cast<const E*>(hidden), static_cast<E*>(y),
                  static_cast<const E*>(cos), static_cast<const E*>(sin), rotary_size);
  });
}

void footplate_sample(float* logits, int64_t stride, const sampling::Draw* draws,
                      int64_t* tokens, int num_rows, int vocab) {
  sampling::sample(logits, stride, draws, tokens, num_rows, vocab);
}

double footplate_log_sum_exp(const float* logits, int vocab) {
  return logprobs::log_sum_exp(logits, vocab);
}

}  // extern "C"
