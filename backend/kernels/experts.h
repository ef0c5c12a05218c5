// Experts of a mixture: gated MLPs, each over the rows that are routed to it, and what their results
// add up to for each token.
#pragma once

#include <vector>

#include "linear.h"

struct Expert {
  const LinearLayer* gated;
  const LinearLayer* down;
};

// Who computes what. A token has `top_k` slots, each of which names an expert; slot s is of token
// s / top_k. Sorted by expert, slots stand at `places`; pieces are runs of them.
struct Routing {
  struct Piece {
    int32_t expert, first, count;
  };
  // Rows that share one pass over an expert's weights: enough to make up for reading them, and
  // few enough for what lies between the two layers to stay in a core's cache.
  static constexpr int piece_rows = 256;

  std::vector<int32_t> ends;    // of each expert's run
  std::vector<int32_t> sorted;  // slots
  std::vector<int32_t> places;  // of slots
  std::vector<Piece> pieces;

  // False when an index names no expert.
  bool sort(const int64_t* index, int num_slots, int num_experts) {
    ends.assign(num_experts, 0);
    sorted.resize(num_slots);
    places.resize(num_slots);
    pieces.clear();
    for (int slot = 0; slot < num_slots; ++slot) {
      if (index[slot] < 0 || index[slot] >= num_experts) return false;
      ++ends[index[slot]];
    }
    int first = 0;
    for (int expert = 0; expert < num_experts; ++expert) {
      int count = ends[expert];
      for (int done = 0; done < count; done += piece_rows)
        pieces.push_back({expert, first + done, std::min(piece_rows, count - done)});
      ends[expert] = first;
      first += count;
    }
    for (int slot = 0; slot < num_slots; ++slot) {
      places[slot] = ends[index[slot]]++;
      sorted[places[slot]] = slot;
    }
    return true;
  }
};

// What the expert of each slot makes of its token, sorted by expert: computed[num_slots, outputs].
//
//   x       rows of whole words, `x_stride` numbers apart
//   linear  (layer, x, x_stride, y, m) computes one layer
template <class E, class Linear>
void compute_experts(const Expert* experts, const Routing& routing, const E* x, size_t x_stride,
                     E* computed, int top_k, const Linear& linear) {
  auto compute = [&](int item, int) {
    static thread_local std::vector<E> rows, hidden;
    const Routing::Piece& piece = routing.pieces[item];
    const Expert& expert = experts[piece.expert];
    constexpr size_t values = sizeof(word) / sizeof(E);
    size_t width = (expert.gated->k + values - 1) / values * values;
    size_t size = expert.gated->n, outputs = expert.down->n;
    rows.resize(piece.count * width);
    hidden.resize(piece.count * size);
    for (int i = 0; i < piece.count; ++i) {
      const E* row = x + routing.sorted[piece.first + i] / top_k * x_stride;
      std::memcpy(rows.data() + i * width, row, width * sizeof(E));
    }
    linear(expert.gated, rows.data(), width, hidden.data(), piece.count);
    linear(expert.down, hidden.data(), size, computed + piece.first * outputs, piece.count);
  };
  int num_pieces = static_cast<int>(routing.pieces.size());
  // A piece per thread needs no waiting between layers. (OpenMP does not nest, so that each then
  // computes alone.) Few pieces would leave threads idle: these compute each piece together.
  if (num_pieces >= 2 * omp_get_max_threads())
    for_each_item(num_pieces, compute);
  else
    for (int item = 0; item < num_pieces; ++item) compute(item, -1);
}

// y[token] = the sum over the token's slots, one after another, of computed * weight; products are
// rounded if weights are as narrow as they are, the sum once.
template <class E, class W>
void add_slots(const Routing& routing, const E* computed, const W* weights, E* y, int num_tokens,
               int top_k, int size) {
  using namespace simd;
#pragma omp parallel for schedule(static) if (static_cast<size_t>(num_tokens) * size > 32768)
  for (int token = 0; token < num_tokens; ++token)
    for (int column = 0; column < size; column += lanes) {
      int count = std::min(lanes, size - column);
      F32 total = zeros();
      for (int slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        const E* from = computed + static_cast<size_t>(routing.places[slot]) * size + column;
        F32 product = load(from, count) * broadcast(to_float(weights[slot]));
        if (sizeof(W) == sizeof(E)) product = rounded<E>(product);
        total = total + product;
      }
      store(y + static_cast<size_t>(token) * size + column, total, count);
    }
}
