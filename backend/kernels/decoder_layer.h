// A decoder layer of the Llama family in one call: norm, attention, residual, norm, gated MLP,
// residual. It does what the single functions do behind one another, to the same bits; what it
// saves is eight ways from Python and back, a twelfth of a small model's step.
#pragma once

#include "attention.h"
#include "norm.h"
#include "quantised.h"

// What Python prepares once per layer.
struct DecoderLayer {
  const Norm* input_norm;
  const LinearLayer* qkv;
  const Norm* query_norm;  // of single heads, or null
  const Norm* key_norm;
  AttentionOptions attention;
  const LinearLayer* output;
  const Norm* mlp_norm;
  const LinearLayer* gate_up;
  const LinearLayer* down;
};

// Memory for what lies between the parts of a layer, allocated once and kept.
template <class E>
struct LayerScratch {
  std::vector<E> normed;    // [num_tokens, hidden_size]
  std::vector<E> qkv;       // [num_tokens, qkv.n]
  std::vector<E> attended;  // [num_tokens, output.k]
  std::vector<E> gated;     // [num_tokens, down.k]
};

template <class E>
E* room(std::vector<E>& memory, int rows, int row_size) {
  size_t size = static_cast<size_t>(rows) * row_size;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

// y[num_tokens, hidden_size] of hidden[num_tokens, hidden_size]; cos and sin as in
// rope_and_cache. Sizes of rows are whole words.
template <class E>
void decoder_layer(const DecoderLayer& layer, const LayerCache& cache, const StepTables& step,
                   const E* hidden, E* y, const E* cos, const E* sin, int rotary_size) {
  static thread_local LayerScratch<E> scratch;
  int m = step.num_tokens, hidden_size = layer.qkv->k;
  E* normed = room(scratch.normed, m, hidden_size);
  E* qkv = room(scratch.qkv, m, layer.qkv->n);
  E* attended = room(scratch.attended, m, layer.output->k);
  E* gated = room(scratch.gated, m, layer.down->k);
  int kv_size = cache.num_kv_heads * (cache.key_size + cache.value_size);
  int num_heads = (layer.qkv->n - kv_size) / cache.key_size;

  rms_norm(*layer.input_norm, hidden, hidden_size, normed, m, hidden_size);
  apply<E>(*layer.qkv, normed, hidden_size, nullptr, qkv, false, m);
  rope_and_cache(cache, step, qkv, layer.qkv->n, num_heads, cos, sin, rotary_size,
                 layer.query_norm, layer.key_norm);
  paged_attention(cache, step, layer.attention, qkv, layer.qkv->n, cache.key_size, attended,
                  num_heads);
  apply(*layer.output, attended, layer.output->k, hidden, y, false, m);
  rms_norm(*layer.mlp_norm, y, hidden_size, normed, m, hidden_size);
  apply<E>(*layer.gate_up, normed, hidden_size, nullptr, gated, false, m);
  apply(*layer.down, gated, layer.down->k, y, y, false, m);
}
