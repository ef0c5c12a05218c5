// Linear layers over packed weights: y[M, N] = x[M, K] . w[N, K]^T, and what follows it.
//
// Packed weights are groups of 16 columns: [num_groups][num_words][16 lanes] words, where word i
// of a column holds its i-th few values along k. Columns are padded with zeros to whole groups,
// k to whole words. (Quantised weights: see quantised.h.) A gated layer has two matrices; the four
// groups of a panel are two of the gate's and the two of `up` that meet them, so that one thread
// has both in its hands.
#pragma once

#include <omp.h>

#include "tile.h"
#include "words.h"

// What Python prepares once per layer.
struct LinearLayer {
  const word* weights;
  const void* bias;    // in the type of the activations, or null: [n], or [2][n] when gated
  int32_t n;           // outputs
  int32_t k;           // inputs
  int32_t type;        // of activations, see `Type`
  int32_t format;      // of weights, see `Format`
  int32_t activation;  // see `Activation`
  float limit;         // gate goes no higher, up stays within plus and minus this; 0 for none
  float alpha;         // of SWIGLU_OAI
};

enum Format : int32_t { AS_ACTIVATIONS = 0, INT8 = 1, INT4 = 2 };
// SWIGLU_OAI, of gpt-oss, is gate * sigmoid(alpha * gate) * (up + 1).
enum Activation : int32_t { NOT_GATED = 0, SILU = 1, GELU_TANH = 2, SWIGLU_OAI = 3 };

// The panel that this thread will work on next, fetched while it still computes on the one before:
// with more than a few rows a panel is computed for longer than it takes to read, and neither
// should wait for the other. Evenly over all steps of the panel, so that memory never rests.
struct Ahead {
  const char* at = nullptr;
  size_t stride = 0;  // bytes from one step to the next
  size_t reach = 0;   // bytes fetched at a step, whole lines and no less than the stride

  Ahead() = default;
  Ahead(const word* panel, size_t num_words, size_t num_steps)
      : at(reinterpret_cast<const char*>(panel)) {
    stride = (num_words * sizeof(word) + num_steps - 1) / num_steps;
    reach = (stride + 63) / 64 * 64;
  }

  INLINE void step() {
    for (size_t line = 0; line < reach; line += 64) __builtin_prefetch(at + line);
    at += stride;
  }
};

// Floating point weights: sums over blocks of k, added in order. Shorter sums round less, and
// these lengths are those of oneDNN's bf16 product, which makes the results equal bit for bit.
template <class E>
struct FloatProduct {
  using Words = typename WordsOf<E>::Type;
  // So few rows are computed faster than memory is read, by a CPU that reads ahead by itself;
  // fetching more would be in its way (measured: by 6 %).
  static constexpr int rows_read_alone = 2;

  const E* x;
  size_t x_stride;  // in numbers
  int num_words;    // along k
  int block_words;

  FloatProduct(const E* x, size_t x_stride, int k) : x(x), x_stride(x_stride) {
    constexpr int values = sizeof(word) / sizeof(E);
    num_words = (k + values - 1) / values;
    block_words = values == 2 && k > 1024 ? 512 : 256;
  }

  int num_steps() const { return num_words; }
  size_t group_words() const { return static_cast<size_t>(num_words) * simd::lanes; }

  // total[r][v] = x[row + r] . weights of group v
  template <int ROWS>
  INLINE void multiply(int row, const word* const* groups, simd::F32 (*total)[panel_groups],
                       Ahead& ahead) const {
    constexpr int V = simd::tile_vectors;
    const word* rows = reinterpret_cast<const word*>(x + row * x_stride);
    for (int v = 0; v < panel_groups; v += V) {
      for (int first = 0; first < num_words; first += block_words) {
        simd::F32 sum[ROWS][V];
        const word* weights[V];
        for (int j = 0; j < V; ++j) weights[j] = groups[v + j] + first * simd::lanes;
        UNROLL
        for (int r = 0; r < ROWS; ++r)
          UNROLL
          for (int j = 0; j < V; ++j) sum[r][j] = simd::zeros();
        multiply_add<Words, ROWS, V>(sum, rows + first, x_stride * sizeof(E) / sizeof(word),
                                     weights, simd::lanes,
                                     std::min(block_words, num_words - first), ahead);
        UNROLL
        for (int r = 0; r < ROWS; ++r)
          UNROLL
          for (int j = 0; j < V; ++j)
            total[r][v + j] = first == 0 ? sum[r][j] : total[r][v + j] + sum[r][j];
      }
    }
  }
};

// One function per kind of product, so that the tile is compiled once for all that may follow.
template <class Product>
void multiply_rows(const Product& product, int row, int rows, const word* const* groups,
                   simd::F32 (*total)[panel_groups], Ahead& ahead) {
  with_rows(rows, [&](auto constant) __attribute__((always_inline)) {
    product.template multiply<decltype(constant)::value>(row, groups, total, ahead);
  });
}

// Walk over all tiles of the result; finish(row, rows, panel, total) writes one.
template <class Product, class Finish>
void for_each_tile(const Product& product, const word* weights, int m, int num_groups,
                   const Finish& finish) {
  int num_panels = (num_groups + panel_groups - 1) / panel_groups;
  // A panel for all rows, unless that leaves threads without work: then rows in blocks.
  int wanted_blocks = (2 * omp_get_max_threads() + num_panels - 1) / num_panels;
  int block_tiles = (m + wanted_blocks * simd::tile_rows - 1) / (wanted_blocks * simd::tile_rows);
  int block_rows = block_tiles * simd::tile_rows;
  int row_blocks = (m + block_rows - 1) / block_rows;
  size_t group_words = product.group_words();
  for_each_item(num_panels * row_blocks, [&](int item, int next) {
    int panel = item / row_blocks, row = item % row_blocks * block_rows;
    int last_row = std::min(m, row + block_rows);
    const word* groups[panel_groups];
    for (int j = 0; j < panel_groups; ++j)
      groups[j] = weights + std::min(panel * panel_groups + j, num_groups - 1) * group_words;
    Ahead ahead;
    if (next >= 0 && last_row - row > Product::rows_read_alone) {
      int num_tiles = (last_row - row + simd::tile_rows - 1) / simd::tile_rows;
      ahead = Ahead(weights + next / row_blocks * panel_groups * group_words,
                    panel_groups * group_words,
                    num_tiles * product.num_steps() * (panel_groups / simd::tile_vectors));
    }
    for (int rows; row < last_row; row += rows) {
      rows = balanced_tile(last_row - row);
      simd::F32 total[simd::tile_rows][panel_groups];
      multiply_rows(product, row, rows, groups, total, ahead);
      finish(row, rows, panel, total);
    }
  });
}

// y = x w^T (+ bias) (+ residual); rounded before the residual is added, where a module of its
// own would have written its result. y may be the residual. With `wide`, y is float whatever E
// is, of the same rounded values: logits, which are looked at in float next.
template <class E, class Product>
void linear(const LinearLayer& layer, const Product& product, const E* residual, void* y,
            bool wide, int m) {
  using namespace simd;
  const E* bias = static_cast<const E*>(layer.bias);
  int n = layer.n;
  auto finish = [&](int first_row, int rows, int panel, const F32(*total)[panel_groups]) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < panel_groups; ++j) {
        int column = panel * panel_columns + j * lanes, count = std::min(lanes, n - column);
        if (count <= 0) break;
        size_t at = static_cast<size_t>(first_row + r) * n + column;
        F32 v = total[r][j];
        if (bias) v = v + load(bias + column, count);
        if (residual) v = rounded<E>(v) + load(residual + at, count);
        if (wide)
          store(static_cast<float*>(y) + at, rounded<E>(v), count);
        else
          store(static_cast<E*>(y) + at, v, count);
      }
    }
  };
  for_each_tile(product, layer.weights, m, (n + lanes - 1) / lanes, finish);
}

// What a gated layer makes of its two products, rounded wherever an eager module would have written
// its result.
template <class E>
INLINE simd::F32 join(const LinearLayer& layer, simd::F32 gate, simd::F32 up) {
  using namespace simd;
  gate = rounded<E>(gate);
  up = rounded<E>(up);
  if (layer.limit > 0) {
    // The first operand is the one that is dropped when the other is NaN.
    F32 limit = broadcast(layer.limit);
    gate = min(limit, gate);
    up = max(zeros() - limit, min(limit, up));
  }
  if (layer.activation == SWIGLU_OAI) {
    F32 scaled = rounded<E>(broadcast(layer.alpha) * gate);
    F32 one = broadcast(1.0f), sigmoid = one / (one + exp(zeros() - scaled));
    return rounded<E>(up + one) * rounded<E>(gate * rounded<E>(sigmoid));
  }
  return rounded<E>(layer.activation == SILU ? silu(gate) : gelu_tanh(gate)) * up;
}

// y = activation(x gate^T) * (x up^T).
template <class E, class Product>
void gated(const LinearLayer& layer, const Product& product, E* y, int m) {
  using namespace simd;
  constexpr int half = panel_groups / 2;
  const E* bias = static_cast<const E*>(layer.bias);
  int n = layer.n;
  auto finish = [&](int first_row, int rows, int panel, const F32(*total)[panel_groups]) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < half; ++j) {
        int column = (panel * half + j) * lanes, count = std::min(lanes, n - column);
        if (count <= 0) break;
        F32 gate = total[r][j], up = total[r][half + j];
        if (bias) {
          gate = gate + load(bias + column, count);
          up = up + load(bias + n + column, count);
        }
        store(y + static_cast<size_t>(first_row + r) * n + column, join<E>(layer, gate, up),
              count);
      }
    }
  };
  int num_groups = (n + lanes - 1) / lanes;
  for_each_tile(product, layer.weights, m, (num_groups + half - 1) / half * panel_groups, finish);
}

// Where group i of a matrix stands among all groups of a layer.
struct GroupOrder {
  int32_t first;   // of this matrix
  int32_t run;     // groups that stand together
  int32_t stride;  // from the start of one run to the next

  size_t operator()(int group) const { return first + group / run * stride + group % run; }
};

// Pack w[n, k], rows `stride` numbers apart.
template <class E>
void pack(const E* w, size_t stride, int n, int k, word* packed, GroupOrder order) {
  using namespace simd;
  constexpr int values = sizeof(word) / sizeof(E);
  int num_words = (k + values - 1) / values, num_groups = (n + lanes - 1) / lanes;
#pragma omp parallel for schedule(static)
  for (int group = 0; group < num_groups; ++group) {
    word* to = packed + order(group) * num_words * lanes;
    int columns = std::min(lanes, n - group * lanes);
    if (columns < lanes) std::memset(to, 0, num_words * lanes * sizeof(word));
    for (int i = 0; i < num_words; ++i) {
      int count = std::min(values, k - i * values);
      for (int lane = 0; lane < columns; ++lane) {
        const E* from = w + (group * lanes + lane) * stride + i * values;
        word packed_word = 0;
        if (count == values)
          std::memcpy(&packed_word, from, sizeof(word));
        else
          std::memcpy(&packed_word, from, count * sizeof(E));
        to[i * lanes + lane] = packed_word;
      }
    }
  }
}

// Row `row` of a packed matrix, back in one piece: y[k].
template <class E>
void unpack(const word* weights, int64_t row, int k, E* y) {
  using namespace simd;
  constexpr int values = sizeof(word) / sizeof(E);
  int num_words = (k + values - 1) / values;
  const word* from = weights + row / lanes * num_words * lanes + row % lanes;
  for (int i = 0; i < num_words; ++i)
    std::memcpy(y + i * values, from + i * lanes, std::min(values, k - i * values) * sizeof(E));
}
