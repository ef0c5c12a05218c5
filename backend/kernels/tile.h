// The micro-kernel: a few rows of activations times 64 columns of packed weights, in registers.
//
// Everything that multiplies matrices goes through it: linear layers, queries by keys,
// probabilities by values. Each element of a result owns one lane of one accumulator and is
// summed over ascending k. How many other rows stand in the tile changes nothing about that sum:
// this is what makes a request's numbers independent of its batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "simd.h"

// A group is 16 columns of weights, one per lane; a panel is 4 groups.
constexpr int panel_groups = 4;
constexpr int panel_columns = panel_groups * simd::lanes;

// Nothing to fetch for later; see `Ahead` in linear.h for the other case.
struct NothingAhead {
  INLINE void step() {}
};

// sum[r][v] += x[r][k] * w[v][k], for `steps` words along k.
//
//   x  ROWS rows of activations, `x_stride` words apart
//   w  VECTORS groups of weights; step i of a group is at w[v] + i * w_stride, 16 words
template <class Words, int ROWS, int VECTORS, class A>
INLINE void multiply_add(typename Words::Sum (&sum)[ROWS][VECTORS], const word* x, size_t x_stride,
                         const word* const* w, size_t w_stride, int steps, A& ahead) {
  A local = ahead;  // stays in a register
  for (int i = 0; i < steps; ++i) {
    local.step();
    UNROLL
    for (int part = 0; part < Words::parts; ++part) {
      typename Words::Operand weights[VECTORS];
      UNROLL
      for (int v = 0; v < VECTORS; ++v) weights[v] = Words::weights(w[v] + i * w_stride, part);
      UNROLL
      for (int r = 0; r < ROWS; ++r) {
        auto x_r = Words::activations(x + r * x_stride + i * Words::activation_words, part);
        UNROLL
        for (int v = 0; v < VECTORS; ++v)
          sum[r][v] = Words::multiply_add(sum[r][v], weights[v], x_r);
      }
    }
  }
  ahead = local;
}

// Call `body` with the number of rows as a compile-time constant, 1 to tile_rows.
template <int ROWS = simd::tile_rows, class Body>
INLINE void with_rows(int rows, const Body& body) {
  if constexpr (ROWS == 1) {
    body(std::integral_constant<int, 1>{});
  } else if (rows == ROWS) {
    body(std::integral_constant<int, ROWS>{});
  } else {
    with_rows<ROWS - 1>(rows, body);
  }
}

// The height of the next tile when `rows` are left. Tiles of nearly equal height: seven rows are
// 4 + 3 and not 6 + 1, because a tile of one row waits for its weights.
inline int balanced_tile(int rows) {
  int tiles = (rows + simd::tile_rows - 1) / simd::tile_rows;
  return (rows + tiles - 1) / tiles;
}

// Hand out items 0 to count - 1 to the threads, each as soon as a thread is free.
//
// body(item, next): `next` is what the same thread will do afterwards, -1 if nothing. It is
// claimed one item early so that its memory can be fetched during `item`.
template <class Body>
void for_each_item(int count, const Body& body) {
  std::atomic<int> unclaimed{0};
#pragma omp parallel if (count > 1)
  {
    int item = unclaimed++;
    while (item < count) {
      int next = unclaimed++;
      body(item, next < count ? next : -1);
      item = next;
    }
  }
}
