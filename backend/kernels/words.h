// The numbers that kernels are written for, and how they are packed into words.
#pragma once

#include <algorithm>

#include "simd.h"

enum Type : int32_t { FP32 = 0, BF16 = 1 };

template <class E>
struct WordsOf;
template <>
struct WordsOf<float> {
  using Type = simd::Fp32Words;
};
template <>
struct WordsOf<bf16> {
  using Type = simd::Bf16Words;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  word bits = static_cast<word>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
