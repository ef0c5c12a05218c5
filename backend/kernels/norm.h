// RMSNorm (Zhang and Sennrich 2019), and what stands between a projection to queries, keys and
// values and attention: the norm of each head, rotary positions (Su et al. 2021), the cache.
//
// Every step is rounded where the eager modules write their results to memory.
#pragma once

#include "cache.h"

// What Python prepares once per layer. Families differ in when they round:
//   Llama: round(weight * round(x / rms));  Gemma: round((1 + weight) * x / rms);
//   OLMo 2: round(weight * x / rms)
struct Norm {
  const void* weight;  // [size]
  float epsilon;
  float weight_offset;
  int32_t rounds_before_weight;
};

template <class E>
INLINE void normalise(const Norm& norm, const E* x, E* y, int size) {
  using namespace simd;
  const E* weight = static_cast<const E*>(norm.weight);
  F32 squares = zeros();
  int whole = size / lanes * lanes, rest = size - whole;
  for (int i = 0; i < whole; i += lanes) {
    F32 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (rest) {
    F32 v = load(x + whole, rest);
    squares = fma(v, v, squares);
  }
  F32 scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + norm.epsilon));
  F32 offset = broadcast(norm.weight_offset);
  auto scaled = [&](F32 v, F32 w) __attribute__((always_inline)) {
    F32 u = v * scale;
    if (norm.rounds_before_weight) u = rounded<E>(u);
    return (w + offset) * u;
  };
  for (int i = 0; i < whole; i += lanes) store(y + i, scaled(load(x + i), load(weight + i)));
  if (rest)
    store(y + whole, scaled(load(x + whole, rest), load(weight + whole, rest)), rest);
}

// y[m, size] = normalised x[m, size], rows `x_stride` numbers apart.
template <class E>
void rms_norm(const Norm& norm, const E* x, size_t x_stride, E* y, int m, int size) {
#pragma omp parallel for schedule(static) if (static_cast<size_t>(m) * size > 32768)
  for (int row = 0; row < m; ++row)
    normalise(norm, x + row * x_stride, y + static_cast<size_t>(row) * size, size);
}

// y = x * cos + rotate_half(x) * sin on the first `size` numbers of a head. y may be x.
template <class E>
INLINE void rotate(const E* x, E* y, const E* cos, const E* sin, int size) {
  using namespace simd;
  int half = size / 2;
  for (int i = 0; i < half; i += lanes) {
    int count = std::min(lanes, half - i);
    F32 a = load(x + i, count), b = load(x + half + i, count);
    F32 cos_a = load(cos + i, count), cos_b = load(cos + half + i, count);
    F32 sin_a = load(sin + i, count), sin_b = load(sin + half + i, count);
    store(y + i, rounded<E>(a * cos_a) - rounded<E>(b * sin_a), count);
    store(y + half + i, rounded<E>(b * cos_b) + rounded<E>(a * sin_b), count);
  }
}

// One row per token of a fused projection, changed in place:
//
//   qkv  [num_tokens][num_heads x key_size | num_kv_heads x key_size | num_kv_heads x value_size]
//   cos, sin  [num_tokens, rotary_size], the first rotary_size numbers of a head are rotated
//
// Queries and keys are normalised per head where there is a norm, and rotated; keys and values
// are written to the cache.
template <class E>
void rope_and_cache(const LayerCache& cache, const StepTables& step, E* qkv, size_t row_stride,
                    int num_heads, const E* cos, const E* sin, int rotary_size,
                    const Norm* query_norm, const Norm* key_norm) {
  Pages<E> pages(cache);
  int size = pages.key_size;
#pragma omp parallel for schedule(static) if (step.num_tokens > 4)
  for (int t = 0; t < step.num_tokens; ++t) {
    E* row = qkv + t * row_stride;
    for (int h = 0; h < num_heads + pages.num_kv_heads; ++h) {
      E* head = row + static_cast<size_t>(h) * size;
      const Norm* norm = h < num_heads ? query_norm : key_norm;
      if (norm) normalise(*norm, head, head, size);
      rotate(head, head, cos + static_cast<size_t>(t) * rotary_size,
             sin + static_cast<size_t>(t) * rotary_size, rotary_size);
    }
    const E* keys = row + static_cast<size_t>(num_heads) * size;
    const E* values = keys + static_cast<size_t>(pages.num_kv_heads) * size;
    for (int h = 0; h < pages.num_kv_heads; ++h)
      pages.write(step.slots[t], h, keys + static_cast<size_t>(h) * size,
                  values + static_cast<size_t>(h) * pages.value_size);
  }
}
