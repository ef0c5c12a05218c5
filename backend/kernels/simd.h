// Sixteen lanes, whatever the CPU.
//
// All kernels are written in terms of F32, sixteen floats: one register with AVX-512, two with
// AVX2, four with NEON, an array in plain C++. So packed weights look the same everywhere, and so
// does the order in which every sum is taken. One header per instruction set provides
//
//   name, tile_rows, tile_vectors     what it is called, and the size of its register tile
//   F32   + - * / fma max min         lane by lane; fma(a, b, c) is a * b + c, rounded once
//         zeros broadcast load store  load and store take a count too: the lanes beyond are zero,
//                                     or are left alone in memory
//         where_less keep_lanes       choice by comparison, and by lane number
//         append_positive             the lanes above zero to the end of a list, which needs room
//                                     for sixteen; says how many they are
//         sum maximum                 over the sixteen lanes, in one fixed order
//         nearest times_power_of_two  for exp
//   I32   + & shift_right             sixteen 32-bit integers, or as many words
//         iload ibroadcast isum
//         to_float to_int truncate    to_int rounds to nearest, truncate towards zero
//         store_bytes                 of each lane the lowest byte
//         lookup                      of each byte, 0 to 15, what a table of 16 bytes holds there
//   Bf16Words, Int8Words              how packed numbers enter the micro-kernel, see below
//
// and this file adds what can be said in these words.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// A number in bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// A word is 32 bits of packed numbers that share a lane: one float, two bf16, four int8 or eight
// int4, consecutive along k. It is the step in which the micro-kernel walks along k.
using word = uint32_t;

namespace simd {
constexpr int lanes = 16;
constexpr float infinity = std::numeric_limits<float>::infinity();

INLINE word bits_of(float x) {
  word bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
INLINE float float_of(word bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace simd

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_plain.h"
#endif

namespace simd {

// What the micro-kernel multiplies. `Words` types say how a word of weights, one per lane, and a
// word of activations, the same in all lanes, become operands, and how these are multiplied and
// added to a sum. An instruction set that cannot multiply a whole word at once does it in
// `parts`. Two of them are the same everywhere.
struct Fp32Words {
  static constexpr int parts = 1;
  static constexpr int activation_words = 1;  // words of activations per word of weights
  using Sum = F32;
  using Operand = F32;
  static INLINE F32 weights(const word* w, int) { return load(reinterpret_cast<const float*>(w)); }
  static INLINE F32 activations(const word* x, int) {
    return broadcast(*reinterpret_cast<const float*>(x));
  }
  static INLINE F32 multiply_add(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};

// What a 4-bit weight stands for, up to the scale of its block. Denser around zero, as weights
// are: fitted by Lloyd's algorithm to normal and heavier-tailed blocks of 128, each scaled to fit.
// Against sixteen equal steps from the smallest to the largest number of a block this lowers the
// root mean square error by 12 % (normal) to 22 % (Student's t, 5 degrees of freedom).
constexpr int num_levels = 16;
constexpr int8_t levels[num_levels] = {-127, -92, -69, -52, -39, -27, -17, -7,
                                       1,    10,  20,  31,  43,  58,  77,  105};

// Eight 4-bit weights in a word: the lower halves of its bytes meet the first word of int8
// activations, the upper halves the second.
struct Int4Words {
  static constexpr int parts = 2 * Int8Words::parts;
  static constexpr int activation_words = 2;
  using Sum = I32;
  using Operand = Int8Words::Operand;
  static INLINE Operand weights(const word* w, int part) {
    struct Table {
      uint8_t bytes[num_levels];
      constexpr Table() : bytes() {
        for (int i = 0; i < num_levels; ++i)
          bytes[i] = static_cast<uint8_t>(levels[i] + Int8Words::weight_offset);
      }
    };
    static constexpr Table table;
    I32 codes = iload(w);
    if (part >= Int8Words::parts) codes = shift_right<4>(codes);
    I32 bytes = lookup(table.bytes, codes & ibroadcast(0x0f0f0f0f));
    return Int8Words::operand(bytes, part % Int8Words::parts);
  }
  static INLINE Operand activations(const word* x, int part) {
    return Int8Words::activations(x + part / Int8Words::parts, part % Int8Words::parts);
  }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return Int8Words::multiply_add(sum, w, x);
  }
};

// Rounding to what memory holds: where an eager module would have written its result.
template <class E>
INLINE F32 rounded(F32 v);
template <>
INLINE F32 rounded<float>(F32 v) {
  return v;
}
template <>
INLINE F32 rounded<bf16>(F32 v) {
  return round_to_bf16(v);
}

// e^x within about one unit in the last place; exactly zero below -87.3, so that a masked score
// of -infinity weighs nothing. NaN stays NaN.
INLINE F32 exp(F32 x) {
  const F32 lowest = broadcast(-87.33f);
  // The first operand is the one that is dropped when the other is NaN.
  F32 clamped = min(broadcast(88.72f), max(lowest, x));
  F32 n = nearest(clamped * broadcast(1.44269504f));
  F32 r = fma(n, broadcast(-0.693359375f), clamped);  // x = n ln 2 + r, with ln 2 in two pieces
  r = fma(n, broadcast(2.12194440e-4f), r);
  F32 p = broadcast(1.9875691500e-4f);  // Cephes' expf polynomial
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
  return where_less(x, lowest, zeros(), times_power_of_two(p, n));
}

INLINE F32 silu(F32 x) { return x / (broadcast(1.0f) + exp(zeros() - x)); }

INLINE F32 tanh(F32 x) {
  // 1 - 2 / (e^2x + 1) loses digits next to zero, so small arguments take the odd series.
  F32 e = exp(x + x);
  F32 large = broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f));
  F32 s = x * x;
  F32 p = fma(s, broadcast(-5.70498872745e-3f), broadcast(2.06390887954e-2f));  // Cephes' tanhf
  p = fma(p, s, broadcast(-5.37397155531e-2f));
  p = fma(p, s, broadcast(1.33314422036e-1f));
  p = fma(p, s, broadcast(-3.33332819422e-1f));
  F32 small = fma(p * s, x, x);
  return where_less(s, broadcast(0.625f * 0.625f), small, large);
}

INLINE F32 gelu_tanh(F32 x) {
  F32 inner = broadcast(0.7978845608f) * fma(broadcast(0.044715f) * x * x, x, x);
  return broadcast(0.5f) * x * (broadcast(1.0f) + tanh(inner));
}

// NaN becomes zero and infinity the largest number, as torch.nan_to_num does.
template <class E>
INLINE F32 finite(F32 v) {
  const float largest = sizeof(E) == 2 ? 3.38953139e38f : std::numeric_limits<float>::max();
  F32 clamped = min(broadcast(largest), max(broadcast(-largest), v));
  // False for NaN alone.
  return where_less(clamped, broadcast(infinity), clamped, zeros());
}

}  // namespace simd
