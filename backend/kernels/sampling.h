// From logits to a token: temperature, min_p, top_k, top_p, inverse CDF. Nothing is sorted.
//
// A row belongs to one thread from its first logit to its token, and stays in that core's cache
// meanwhile. Its softmax is summed in one order; all that follows is comparison and integer
// arithmetic, and therefore exact. So its token depends on nothing beside it.
//
// What min_p, top_k and top_p mean together, and the integer weights of probabilities, are defined
// in cutoff.py of the runner; `Sampler` says how the noise chooses.
#pragma once

#include <vector>

#include "words.h"

namespace sampling {

// What Python says about a row.
struct Draw {
  double temperature;  // 0 takes the largest logit, less skips the row; else `MIN_TEMPERATURE`
  double min_p;        // 0 keeps all
  double top_k;        // 0 keeps all
  double top_p;        // 1 keeps all
  double noise;        // in [0, 1)
};

// How much of a row is looked at in one go.
constexpr int chunk_vectors = 32;
constexpr int chunk_size = chunk_vectors * simd::lanes;

// Call body(first, size) for each chunk of a row.
template <class Body>
INLINE void for_each_chunk(int vocab, const Body& body) {
  for (int first = 0; first < vocab; first += chunk_size)
    body(first, std::min(chunk_size, vocab - first));
}

// Call body(first, count) for each vector; `count` is a constant but for the last one.
template <class Body>
INLINE void for_each_vector(int size, const Body& body) {
  int whole = size / simd::lanes * simd::lanes;
  for (int i = 0; i < whole; i += simd::lanes) body(i, simd::lanes);
  if (whole < size) body(whole, size - whole);
}

struct Largest {
  float logit;
  int token;       // the first one
  bool is_valid;  // no logit is NaN or +infinity
};

inline Largest find_largest(const float* logits, int vocab) {
  using namespace simd;
  const F32 none = broadcast(-infinity), bound = broadcast(infinity);
  F32 bad = zeros();
  Largest largest{-infinity, 0, false};
  for_each_chunk(vocab, [&](int first, int size) __attribute__((always_inline)) {
    F32 top = none;
    for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
      F32 v = load(logits + first + i, n);
      if (n < lanes) v = keep_lanes(v, 0, n, none);
      top = max(top, v);
      bad = where_less(v, bound, bad, v);
    });
    float logit = maximum(top);
    if (logit > largest.logit) largest = {logit, first, false};
  });
  // A bad one makes the sum infinite or NaN.
  if (!(sum(bad) == 0.0f)) return largest;
  while (logits[largest.token] != largest.logit) ++largest.token;
  largest.is_valid = true;
  return largest;
}

// What is less likely than this beside the largest weighs nothing, see `weigh`. To say so here
// keeps denormals, which some CPUs multiply slowly, out of all that follows.
constexpr float lowest_exponent = -60.0f;

// row = e^(row / temperature - largest). Returns the sum.
inline float exponentiate(float* row, int vocab, float temperature, float largest) {
  using namespace simd;
  const F32 divisor = broadcast(temperature), shift = broadcast(largest);
  const F32 lowest = broadcast(lowest_exponent);
  double total = 0.0;
  for_each_chunk(vocab, [&](int first, int size) __attribute__((always_inline)) {
    F32 part = zeros();
    for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
      float* p = row + first + i;
      F32 exponent = load(p, n) / divisor - shift;
      F32 e = where_less(exponent, lowest, zeros(), simd::exp(exponent));
      if (n < lanes) e = keep_lanes(e, 0, n, zeros());
      store(p, e, n);
      part = part + e;
    });
    total += sum(part);
  });
  return static_cast<float>(total);
}

// Weights are probabilities in units of 2^-52, rounded down, `WEIGHT_ONE` in cutoff.py.
constexpr float smallest_weight = 0x1p-52f;
INLINE int64_t weight_of(float prob) { return static_cast<int64_t>(prob * 0x1p52f); }

// The weight of what reaches the cutoff, of at most `chunk_size` numbers.
INLINE int64_t weigh_chunk(const float* probs, int size, float cutoff) {
  using namespace simd;
  const F32 border = broadcast(cutoff), half = broadcast(0x1p26f);
  // In two halves of 26 bits, so that 32-bit lanes hold the sums. All but rounding down is exact.
  I32 upper = ibroadcast(0), lower = ibroadcast(0);
  for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
    F32 v = load(probs + i, n);
    F32 scaled = where_less(v, border, zeros(), v) * half;
    I32 whole = truncate(scaled);
    upper = upper + whole;
    lower = lower + truncate((scaled - to_float(whole)) * half);
  });
  static_assert(chunk_vectors <= 32, "a lane of `lower` holds 32 numbers of 26 bits");
  return (int64_t{isum(upper)} << 26) + (int64_t{isum(shift_right<16>(lower))} << 16) +
         isum(lower & ibroadcast(0xffff));
}

inline int64_t weigh(const float* probs, int num_probs, float cutoff) {
  int64_t total = 0;
  for_each_chunk(num_probs, [&](int first, int size) __attribute__((always_inline)) {
    total += weigh_chunk(probs + first, size, cutoff);
  });
  return total;
}

// row *= scale. Returns the weight of what reaches the cutoff then.
inline int64_t scale_and_weigh(float* row, int vocab, float scale, float cutoff) {
  using namespace simd;
  const F32 factor = broadcast(scale);
  int64_t total = 0;
  for_each_chunk(vocab, [&](int first, int size) __attribute__((always_inline)) {
    for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
      float* p = row + first + i;
      store(p, load(p, n) * factor, n);
    });
    total += weigh_chunk(row + first, size, cutoff);
  });
  return total;
}

// How many of up to 2^24 reach the cutoff, which is positive.
inline int64_t count(const float* probs, int size, float cutoff) {
  using namespace simd;
  const F32 border = broadcast(cutoff), one = broadcast(1.0f);
  F32 total = zeros();
  for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
    total = total + where_less(load(probs + i, n), border, zeros(), one);
  });
  return static_cast<int64_t>(sum(total));
}

// Some positive numbers of a row, without order.
struct Numbers {
  const float* values;
  int size;
  float smallest, largest;
};

// Copy those of low <= value < high to `room`, which may be where they are. It needs space for
// sixteen more.
inline Numbers gather(const float* values, int size, float low, float high, float* room) {
  using namespace simd;
  const F32 first = broadcast(low), last = broadcast(high), none = broadcast(infinity);
  F32 smallest = none, largest = zeros();
  int found = 0;
  for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
    F32 v = load(values + i, n);
    v = where_less(v, first, zeros(), where_less(v, last, v, zeros()));
    smallest = min(smallest, where_less(zeros(), v, v, none));
    largest = max(largest, v);
    found += append_positive(room + found, v);
  });
  return {room, found, -maximum(zeros() - smallest), maximum(largest)};
}

// The largest of the numbers such that all that reach it measure `needed` together, which all of
// them do.
//
// Bits of positive floats are in the order of their values, so halving the range of those that may
// be the border ends after 30 times, whatever they are. Every other time one of the numbers is
// tried, which finds those that many have in common.
template <class Measure>
inline float find_border(Numbers left, int64_t needed, const Measure& measure, float* room) {
  using namespace simd;
  for (bool take_one = true; left.smallest < left.largest; take_one = !take_one) {
    float middle = float_of((bits_of(left.smallest) + bits_of(left.largest)) / 2);
    float pivot = take_one ? left.values[left.size / 2] : middle;
    float next = float_of(bits_of(pivot) + 1);
    if (measure(left.values, left.size, next) >= needed) {
      left = gather(left.values, left.size, next, infinity, room);
      continue;
    }
    int64_t reaching = measure(left.values, left.size, pivot);
    if (reaching >= needed) return pivot;
    needed -= reaching;
    left = gather(left.values, left.size, 0.0f, pivot, room);
  }
  return left.largest;
}

// A lower bound of the k-th largest probability: the k-th largest of many that stand for
// different tokens each, the best of every lane of every chunk. 0 if those are too few.
//
//   best, room  for vocab + 16 numbers
inline float bound_of_rank(const float* probs, int vocab, int64_t k, float* best, float* room) {
  using namespace simd;
  if (k > vocab / (4 * chunk_vectors)) return 0.0f;
  int found = 0;
  for_each_chunk(vocab, [&](int first, int size) __attribute__((always_inline)) {
    F32 top = zeros();
    for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
      top = max(top, load(probs + first + i, n));
    });
    store(best + found, top);
    found += lanes;
  });
  Numbers positive = gather(best, found, 0.0f, infinity, best);
  return positive.size < k ? 0.0f : find_border(positive, k, count, room);
}

// What a thread needs for a row.
struct SamplingRoom {
  std::vector<float> candidates, rest;

  void fit(int vocab) {
    size_t size = static_cast<size_t>(vocab) + simd::lanes;
    if (candidates.size() >= size) return;
    candidates.resize(size);
    rest.resize(size);
  }
};

struct Kept {
  float cutoff;
  int64_t weight;
};

// Apply top_k and top_p to what min_p has kept.
inline Kept cut(const float* probs, int vocab, const Draw& draw, Kept kept, SamplingRoom& room) {
  float* candidates = room.candidates.data();
  float* rest = room.rest.data();
  // What weighs nothing cannot be chosen, and need not be looked at.
  float bound = std::max(kept.cutoff, smallest_weight);
  const float* among = probs;
  int size = vocab;
  if (draw.top_k > 0 && draw.top_k < vocab) {
    int64_t k = static_cast<int64_t>(draw.top_k);
    bound = std::max(bound, bound_of_rank(probs, vocab, k, candidates, rest));
    Numbers left = gather(probs, vocab, bound, simd::infinity, candidates);
    if (left.size >= k) kept.cutoff = find_border(left, k, count, rest);
    among = left.values;
    size = left.size;
    kept.weight = weigh(among, size, kept.cutoff);
  }
  if (draw.top_p < 1) {
    double weight = static_cast<double>(kept.weight);
    int64_t needed = static_cast<int64_t>(std::ceil(draw.top_p * weight));
    // Were the border below this, all tokens below it together could not weigh what top_p drops.
    // A little less, because of rounding.
    double share = static_cast<double>(kept.weight - needed) / size * 0x1p-52 * 0.999;
    bound = std::max({bound, kept.cutoff, static_cast<float>(share)});
    Numbers left = gather(among, size, bound, simd::infinity, candidates);
    kept.cutoff = find_border(left, needed, weigh, rest);
    kept.weight = weigh(left.values, left.size, kept.cutoff);
  }
  return kept;
}

// The token whose share of the weight holds the `target`, when tokens are laid out by id.
inline int token_at(const float* probs, int vocab, float cutoff, int64_t target) {
  for (int first = 0; first < vocab; first += chunk_size) {
    int size = std::min(chunk_size, vocab - first);
    int64_t weight = weigh_chunk(probs + first, size, cutoff);
    if (target < weight) {
      int token = first;
      for (;; ++token) {
        if (probs[token] >= cutoff) target -= weight_of(probs[token]);
        if (target < 0) return token;
      }
    }
    target -= weight;
  }
  return 0;
}

// The token of one row; -1 when the row is no distribution, or is skipped. Unless it is greedy, the row holds its
// probabilities afterwards.
inline int sample_row(float* row, int vocab, const Draw& draw, SamplingRoom& room) {
  if (draw.temperature < 0) return -1;
  Largest largest = find_largest(row, vocab);
  if (!largest.is_valid || largest.logit == -simd::infinity) return -1;
  if (draw.temperature == 0) return largest.token;

  float temperature = static_cast<float>(draw.temperature);
  float peak = largest.logit / temperature;
  if (std::isinf(peak)) return -1;
  float scale = 1.0f / exponentiate(row, vocab, temperature, peak);  // the largest probability
  float cutoff = static_cast<float>(draw.min_p) * scale;
  Kept kept{cutoff, scale_and_weigh(row, vocab, scale, cutoff)};
  room.fit(vocab);
  kept = cut(row, vocab, draw, kept, room);
  // Less than the weight, even rounded: the noise is at most 1 - 2^-53.
  int64_t target = static_cast<int64_t>(draw.noise * static_cast<double>(kept.weight));
  return token_at(row, vocab, kept.cutoff, target);
}

inline void sample(float* logits, size_t stride, const Draw* draws, int64_t* tokens,
                   int num_rows, int vocab) {
#pragma omp parallel for schedule(dynamic) if (static_cast<size_t>(num_rows) * vocab > 32768)
  for (int row = 0; row < num_rows; ++row) {
    static thread_local SamplingRoom room;
    tokens[row] = sample_row(logits + row * stride, vocab, draws[row], room);
  }
}

}  // namespace sampling
