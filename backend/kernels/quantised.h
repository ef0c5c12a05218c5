// Linear layers with weights of 8 and 4 bits, and activations of 8.
//
// Activations are quantised as they come, symmetrically: each row for itself (int8 weights), or
// each block of 128 in it (int4 weights). The products are sums of integers and therefore exact.
//
//   int8   one scale per column. A group is [num_words][16 lanes] words of four weights, and
//          behind them [16] scales (float).
//   int4   one scale per column and block of 128. A group is, block by block, [16] scales and
//          [16][16 lanes] words of eight weights, each of which names one of 16 levels.
#pragma once

#include <vector>

#include "linear.h"

constexpr int int4_block = 128;
constexpr int int4_block_words = int4_block / 8;
constexpr int int4_block_stride = (1 + int4_block_words) * simd::lanes;  // scales, then weights

// Rows of activations as integers.
struct QuantisedRows {
  int num_blocks;
  int block_words;
  std::vector<word> words;       // [m][num_blocks][block_words], four values each
  std::vector<float> scales;     // [m][num_blocks]
  std::vector<int32_t> offsets;  // [m][num_blocks], what the offset of the weights adds to a sum

  size_t stride() const { return static_cast<size_t>(num_blocks) * block_words; }

  // x[m, k] in blocks of `block` values; the last one is filled up with zeros.
  template <class E>
  void quantise(const E* x, size_t x_stride, int m, int k, int block) {
    num_blocks = (k + block - 1) / block;
    block_words = (block + 3) / 4;
    words.resize(m * stride());
    scales.resize(static_cast<size_t>(m) * num_blocks);
    offsets.resize(static_cast<size_t>(m) * num_blocks);
#pragma omp parallel for schedule(static) if (static_cast<size_t>(m) * k > 32768)
    for (int row = 0; row < m; ++row)
      for (int b = 0; b < num_blocks; ++b)
        quantise_block(x + row * x_stride + b * block, std::min(block, k - b * block),
                       static_cast<size_t>(row) * num_blocks + b);
  }

  template <class E>
  void quantise_block(const E* x, int count, size_t index) {
    using namespace simd;
    F32 largest = zeros(), poison = zeros();
    for (int i = 0; i < count; i += lanes) {
      F32 v = load(x + i, std::min(lanes, count - i));
      largest = max(largest, max(v, zeros() - v));
      poison = poison + (v - v);  // zero, or NaN where v is not finite
    }
    float top = maximum(largest);
    F32 to_bytes = broadcast(top > 0 ? 127.0f / top : 0.0f);
    I32 total = ibroadcast(0);
    int8_t* bytes = reinterpret_cast<int8_t*>(&words[index * block_words]);
    int whole = count / lanes * lanes, rest = count - whole;
    for (int i = 0; i < whole; i += lanes) {
      I32 q = to_int(load(x + i) * to_bytes);
      total = total + q;
      store_bytes(bytes + i, q);
    }
    std::memset(bytes + whole, 0, 4 * block_words - whole);
    if (rest) {
      int8_t buffer[lanes];
      I32 q = to_int(load(x + whole, rest) * to_bytes);
      total = total + q;
      store_bytes(buffer, q);
      std::memcpy(bytes + whole, buffer, rest);
    }
    // A row that is not finite must not become one that is: its request has to be told.
    scales[index] = top / 127.0f + sum(poison);
    offsets[index] = Int8Words::weight_offset * isum(total);
  }
};

struct Int8Product {
  static constexpr int rows_read_alone = 2;  // see FloatProduct
  const QuantisedRows& x;

  int num_steps() const { return x.block_words; }
  size_t group_words() const { return static_cast<size_t>(x.block_words + 1) * simd::lanes; }

  template <int ROWS>
  INLINE void multiply(int row, const word* const* groups, simd::F32 (*total)[panel_groups],
                       Ahead& ahead) const {
    using namespace simd;
    constexpr int V = tile_vectors;
    for (int v = 0; v < panel_groups; v += V) {
      I32 sum[ROWS][V];
      UNROLL
      for (int r = 0; r < ROWS; ++r)
        UNROLL
        for (int j = 0; j < V; ++j) sum[r][j] = ibroadcast(-x.offsets[row + r]);
      multiply_add<Int8Words, ROWS, V>(sum, &x.words[row * x.stride()], x.stride(), groups + v,
                                       lanes, x.block_words, ahead);
      UNROLL
      for (int j = 0; j < V; ++j) {
        F32 scale = load(reinterpret_cast<const float*>(groups[v + j] + x.block_words * lanes));
        UNROLL
        for (int r = 0; r < ROWS; ++r)
          total[r][v + j] = to_float(sum[r][j]) * (broadcast(x.scales[row + r]) * scale);
      }
    }
  }
};

struct Int4Product {
  static constexpr int rows_read_alone = 0;  // even one row takes longer to unpack than to read
  const QuantisedRows& x;

  int num_steps() const { return x.num_blocks * int4_block_words; }
  size_t group_words() const { return static_cast<size_t>(x.num_blocks) * int4_block_stride; }

  template <int ROWS>
  INLINE void multiply(int row, const word* const* groups, simd::F32 (*total)[panel_groups],
                       Ahead& ahead) const {
    using namespace simd;
    constexpr int V = tile_vectors;
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < panel_groups; ++v) total[r][v] = zeros();
    for (int v = 0; v < panel_groups; v += V) {
      for (int b = 0; b < x.num_blocks; ++b) {
        const word* weights[V];
        for (int j = 0; j < V; ++j) weights[j] = groups[v + j] + b * int4_block_stride + lanes;
        size_t index = static_cast<size_t>(row) * x.num_blocks + b;
        I32 sum[ROWS][V];
        UNROLL
        for (int r = 0; r < ROWS; ++r)
          UNROLL
          for (int j = 0; j < V; ++j)
            sum[r][j] = ibroadcast(-x.offsets[index + r * x.num_blocks]);
        multiply_add<Int4Words, ROWS, V>(sum, &x.words[index * x.block_words], x.stride(),
                                         weights, lanes, int4_block_words, ahead);
        UNROLL
        for (int j = 0; j < V; ++j) {
          F32 scale = load(reinterpret_cast<const float*>(weights[j] - lanes));
          UNROLL
          for (int r = 0; r < ROWS; ++r)
            total[r][v + j] =
                fma(to_float(sum[r][j]) * broadcast(x.scales[index + r * x.num_blocks]), scale,
                    total[r][v + j]);
        }
      }
    }
  }
};

// One column at a time: w[n, k] to bytes, each column scaled to its largest weight.
template <class E>
void pack_int8(const E* w, size_t stride, int n, int k, word* packed, GroupOrder order) {
  using namespace simd;
  int num_words = (k + 3) / 4, num_groups = (n + lanes - 1) / lanes;
#pragma omp parallel for schedule(static)
  for (int group = 0; group < num_groups; ++group) {
    word* to = packed + order(group) * (num_words + 1) * lanes;
    std::memset(to, 0, (num_words + 1) * lanes * sizeof(word));
    for (int lane = 0; lane < std::min(lanes, n - group * lanes); ++lane) {
      const E* column = w + (group * lanes + lane) * stride;
      F32 largest = zeros();
      for (int i = 0; i < k; i += lanes) {
        F32 v = load(column + i, std::min(lanes, k - i));
        largest = max(largest, max(v, zeros() - v));
      }
      float top = maximum(largest), scale = top / 127.0f;
      F32 to_bytes = broadcast(top > 0 ? 127.0f / top : 0.0f);
      for (int i = 0; i < k; i += lanes) {
        int count = std::min(lanes, k - i);
        alignas(64) int8_t bytes[lanes];
        store_bytes(bytes, to_int(load(column + i, count) * to_bytes) +
                               ibroadcast(Int8Words::weight_offset));
        for (int j = 0; j < (count + 3) / 4; ++j)
          std::memcpy(to + (i / 4 + j) * lanes + lane, bytes + 4 * j, sizeof(word));
      }
      std::memcpy(to + num_words * lanes + lane, &scale, sizeof scale);
    }
  }
}

// The level next to v, or its number.
template <bool NUMBER>
INLINE simd::F32 nearest_level(simd::F32 v) {
  using namespace simd;
  F32 found = broadcast(NUMBER ? 0.0f : levels[0]);
  UNROLL
  for (int i = 1; i < num_levels; ++i) {
    F32 middle = broadcast(0.5f * (levels[i - 1] + levels[i]));
    found = where_less(middle, v, broadcast(NUMBER ? static_cast<float>(i) : levels[i]), found);
  }
  return found;
}

// Sixteen blocks of weights, one per lane, and the search for the scale of each.
struct Int4Search {
  alignas(64) float weights[int4_block][simd::lanes];
  simd::F32 best_scale = simd::zeros();
  simd::F32 best_error = simd::broadcast(simd::infinity);
  simd::F32 fitted_scale = simd::zeros();  // least squares for the levels of the best one

  static INLINE simd::F32 inverse(simd::F32 scale) {
    using namespace simd;
    F32 size = max(scale, zeros() - scale);
    return where_less(broadcast(1e-30f), size, broadcast(1.0f) / scale, zeros());
  }

  void try_scale(simd::F32 scale) {
    using namespace simd;
    F32 to_levels = inverse(scale), error = zeros(), products = zeros(), squares = zeros();
    for (const float* row : weights) {
      F32 v = load(row), level = nearest_level<false>(v * to_levels), d = v - level * scale;
      error = fma(d, d, error);
      products = fma(v, level, products);
      squares = fma(level, level, squares);
    }
    fitted_scale = where_less(error, best_error, products / squares, fitted_scale);
    best_scale = where_less(error, best_error, scale, best_scale);
    best_error = min(error, best_error);
  }

  // The levels reach further down than up, so both signs are tried. A scale that cuts off the
  // largest weights a little represents the many others better. From the best of these, nearest
  // levels and least squares in turn lead to the optimum around it.
  void search() {
    using namespace simd;
    F32 largest = zeros();
    for (const float* row : weights) {
      F32 v = load(row);
      largest = max(largest, max(v, zeros() - v));
    }
    for (float sign : {1.0f, -1.0f})
      for (float reach : {1.05f, 0.95f, 0.85f, 0.75f, 0.65f})
        try_scale(largest * broadcast(sign * reach / 127.0f));
    for (int i = 0; i < 3; ++i) try_scale(fitted_scale);
  }
};

template <class E>
void pack_int4(const E* w, size_t stride, int n, int k, word* packed, GroupOrder order) {
  using namespace simd;
  int num_blocks = (k + int4_block - 1) / int4_block, num_groups = (n + lanes - 1) / lanes;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
  for (int group = 0; group < num_groups; ++group) {
    for (int b = 0; b < num_blocks; ++b) {
      word* to = packed + (order(group) * num_blocks + b) * int4_block_stride;
      Int4Search block;
      for (int i = 0; i < int4_block; ++i) {
        for (int lane = 0; lane < lanes; ++lane) {
          int column = group * lanes + lane, at = b * int4_block + i;
          block.weights[i][lane] =
              column < n && at < k ? to_float(w[column * stride + at]) : 0.0f;
        }
      }
      block.search();
      store(reinterpret_cast<float*>(to), block.best_scale);
      F32 to_levels = Int4Search::inverse(block.best_scale);
      std::memset(to + lanes, 0, int4_block_words * lanes * sizeof(word));
      for (int i = 0; i < int4_block; ++i) {
        // Values 0 to 3 of a word are the lower halves of its bytes, 4 to 7 the upper ones.
        int shift = i % 4 * 8 + i / 4 % 2 * 4;
        alignas(64) float numbers[lanes];
        store(numbers, nearest_level<true>(load(block.weights[i]) * to_levels));
        for (int lane = 0; lane < lanes; ++lane)
          to[(1 + i / 8) * lanes + lane] |= static_cast<word>(numbers[lane]) << shift;
      }
    }
  }
}

// Row `row` of a quantised matrix as numbers again: y[k].
template <class E>
void unpack_int8(const word* weights, int64_t row, int k, E* y) {
  using namespace simd;
  int num_words = (k + 3) / 4;
  const word* from = weights + row / lanes * (num_words + 1) * lanes + row % lanes;
  float scale;
  std::memcpy(&scale, from + num_words * lanes, sizeof scale);
  for (int i = 0; i < k; i += lanes) {
    alignas(64) float numbers[lanes] = {};
    int count = std::min(lanes, k - i);
    for (int j = 0; j < count; ++j) {
      word byte = from[(i + j) / 4 * lanes] >> (i + j) % 4 * 8;
      numbers[j] = Int8Words::weight_offset ? static_cast<int>(byte & 255) - 128
                                            : static_cast<int8_t>(byte);
    }
    store(y + i, load(numbers) * broadcast(scale), count);
  }
}

template <class E>
void unpack_int4(const word* weights, int64_t row, int k, E* y) {
  using namespace simd;
  int num_blocks = (k + int4_block - 1) / int4_block;
  const word* from = weights + row / lanes * num_blocks * int4_block_stride + row % lanes;
  for (int i = 0; i < k; i += lanes) {
    const word* block = from + i / int4_block * int4_block_stride;
    float scale;
    std::memcpy(&scale, block, sizeof scale);
    alignas(64) float numbers[lanes] = {};
    int count = std::min(lanes, k - i);
    for (int j = 0; j < count; ++j) {
      int at = (i + j) % int4_block;
      numbers[j] = levels[block[(1 + at / 8) * lanes] >> (at % 4 * 8 + at / 4 % 2 * 4) & 15];
    }
    store(y + i, load(numbers) * broadcast(scale), count);
  }
}

// A layer of any format, gated or not; see `linear` and `gated`.
template <class E>
void apply(const LinearLayer& layer, const E* x, size_t x_stride, const E* residual, void* y,
           bool wide, int m) {
  if (m == 0) return;
  auto compute = [&](const auto& product) {
    if (layer.activation == NOT_GATED)
      linear(layer, product, residual, y, wide, m);
    else
      gated(layer, product, static_cast<E*>(y), m);
  };
  static thread_local QuantisedRows quantised;
  if (layer.format == INT8) {
    quantised.quantise(x, x_stride, m, layer.k, layer.k);
    compute(Int8Product{quantised});
  } else if (layer.format == INT4) {
    quantised.quantise(x, x_stride, m, layer.k, int4_block);
    compute(Int4Product{quantised});
  } else {
    compute(FloatProduct<E>(x, x_stride, layer.k));
  }
}
