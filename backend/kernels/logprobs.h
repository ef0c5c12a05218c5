// The normaliser of a row of logits, for logprobs. The row stays as it is.
#pragma once

#include "sampling.h"

namespace logprobs {

// log of the sum of e^logit, summed in one order. -infinity if no token is possible, NaN if a logit
// is NaN or +infinity. Two passes, the second of which finds the row in the cache, take half the
// time of one that scales its sum whenever a larger logit comes.
inline double log_sum_exp(const float* logits, int vocab) {
  using namespace simd;
  sampling::Largest largest = sampling::find_largest(logits, vocab);
  if (!largest.is_valid) return std::nan("");
  if (largest.logit == -infinity) return -infinity;
  const F32 shift = broadcast(largest.logit), lowest = broadcast(sampling::lowest_exponent);
  double total = 0.0;
  sampling::for_each_chunk(vocab, [&](int first, int size) __attribute__((always_inline)) {
    F32 part = zeros();
    sampling::for_each_vector(size, [&](int i, int n) __attribute__((always_inline)) {
      F32 exponent = load(logits + first + i, n) - shift;
      F32 e = where_less(exponent, lowest, zeros(), simd::exp(exponent));
      if (n < lanes) e = keep_lanes(e, 0, n, zeros());
      part = part + e;
    });
    total += sum(part);
  });
  return static_cast<double>(largest.logit) + std::log(total);
}

}  // namespace logprobs
