// AVX2 and FMA: sixteen lanes are two registers.
#pragma once

#include <immintrin.h>

namespace simd {

constexpr const char* name = "avx2";

// 4 sums of two registers are enough to keep both multipliers busy, and leave half of the 16
// registers for weights, activations and taking bf16 pairs apart. (6 were measured: 3 % faster in
// fp32, 40 % slower in bf16 and int8.)
constexpr int tile_rows = 4;
constexpr int tile_vectors = 1;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};

INLINE F32 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F32 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}

INLINE __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// The upper halves of eight floats, rounded to nearest, ties to even, in the lower halves of
// 32-bit lanes. A NaN must not be rounded into an infinity.
INLINE __m256i round_upper_half(__m256 v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000),
                          _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  return _mm256_srli_epi32(up, 16);
}
INLINE F32 round_to_bf16(F32 v) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(round_upper_half(v.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(round_upper_half(v.hi), 16))};
}
INLINE F32 load(const bf16* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
INLINE void store(bf16* p, F32 v) {
  __m256i packed = _mm256_packus_epi32(round_upper_half(v.lo), round_upper_half(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

INLINE F32 operator+(F32 a, F32 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
INLINE F32 operator-(F32 a, F32 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
INLINE F32 operator*(F32 a, F32 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
INLINE F32 operator/(F32 a, F32 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
// `v` in lanes first <= lane < last, `otherwise` in the others.
INLINE F32 keep_lanes(F32 v, int first, int last, F32 otherwise) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  auto keep = [&](__m256 value, __m256 other, int offset) {
    __m256i from = _mm256_set1_epi32(first - 1 - offset), to = _mm256_set1_epi32(last - offset);
    __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(lane, from),
                                      _mm256_cmpgt_epi32(to, lane));
    return _mm256_blendv_ps(other, value, _mm256_castsi256_ps(inside));
  };
  return {keep(v.lo, otherwise.lo, 0), keep(v.hi, otherwise.hi, 8)};
}
INLINE int append_positive(float* to, F32 v) {
  // For each set of lanes their numbers, which a permutation puts first.
  struct Orders {
    uint8_t lanes_first[256][8];
    constexpr Orders() : lanes_first() {
      for (int set = 0; set < 256; ++set)
        for (int lane = 0, next = 0; lane < 8; ++lane)
          if (set >> lane & 1) lanes_first[set][next++] = static_cast<uint8_t>(lane);
    }
  };
  static constexpr Orders orders;
  auto append = [&to](__m256 x) {
    int set = _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
    __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(orders.lanes_first[set]));
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(order)));
    to += __builtin_popcount(set);
  };
  float* first = to;
  append(v.lo);
  append(v.hi);
  return static_cast<int>(to - first);
}
INLINE float sum(F32 v) {
  __m256 eight = _mm256_add_ps(v.lo, v.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float maximum(F32 v) {
  __m256 eight = _mm256_max_ps(v.lo, v.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE F32 nearest(F32 v) {
  constexpr int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, to_nearest), _mm256_round_ps(v.hi, to_nearest)};
}

INLINE I32 operator+(I32 a, I32 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
INLINE I32 operator&(I32 a, I32 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
INLINE I32 ibroadcast(word x) {
  __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
INLINE I32 iload(const word* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
template <int BITS>
INLINE I32 shift_right(I32 v) {
  return {_mm256_srli_epi32(v.lo, BITS), _mm256_srli_epi32(v.hi, BITS)};
}
INLINE int32_t isum(I32 v) {
  __m256i eight = _mm256_add_epi32(v.lo, v.hi);
  __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
INLINE F32 to_float(I32 v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
INLINE I32 to_int(F32 v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
INLINE I32 truncate(F32 v) { return {_mm256_cvttps_epi32(v.lo), _mm256_cvttps_epi32(v.hi)}; }
INLINE void store_bytes(int8_t* p, I32 v) {
  alignas(32) int32_t all[lanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), v.lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(all + 8), v.hi);
  for (int i = 0; i < lanes; ++i) p[i] = static_cast<int8_t>(all[i]);
}
INLINE I32 lookup(const uint8_t* table, I32 v) {
  __m256i all =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(all, v.lo), _mm256_shuffle_epi8(all, v.hi)};
}

// For whole n. In two steps, because 2^128 is not a float but what it multiplies may be small.
INLINE F32 times_power_of_two(F32 v, F32 n) {
  auto scale = [](__m256 value, __m256 exponent) {
    __m256i e = _mm256_cvtps_epi32(exponent), half = _mm256_srai_epi32(e, 1);
    __m256i bias = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(value, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
  };
  return {scale(v.lo, n.lo), scale(v.hi, n.hi)};
}

struct Bf16Words {
  static constexpr int parts = 2;  // the lower of the two numbers, then the upper
  static constexpr int activation_words = 1;
  using Sum = F32;
  using Operand = F32;
  static INLINE __m256 half(__m256i pair, int part) {
    return _mm256_castsi256_ps(part == 0
                                   ? _mm256_slli_epi32(pair, 16)
                                   : _mm256_and_si256(pair, _mm256_set1_epi32(-0x10000)));
  }
  static INLINE Operand weights(const word* w, int part) {
    I32 pairs = iload(w);
    return {half(pairs.lo, part), half(pairs.hi, part)};
  }
  static INLINE Operand activations(const word* x, int part) {
    __m256 v = half(_mm256_set1_epi32(static_cast<int>(*x)), part);
    return {v, v};
  }
  static INLINE F32 multiply_add(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};

struct Int8Words {
  static constexpr int activation_words = 1;
  using Sum = I32;
  using Operand = I32;
#if defined(__AVXVNNI__)
  static constexpr int parts = 1;
  static constexpr int weight_offset = 128;  // the instruction wants unsigned weights
  static INLINE Operand operand(I32 bytes, int) { return bytes; }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x.lo),
            _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x.hi)};
  }
#else
  static constexpr int parts = 2;  // even bytes, then odd ones, as 16-bit numbers
  static constexpr int weight_offset = 0;
  static INLINE Operand operand(I32 bytes, int part) {
    auto widen = [part](__m256i v) {
      return _mm256_srai_epi16(part == 0 ? _mm256_slli_epi16(v, 8) : v, 8);
    };
    return {widen(bytes.lo), widen(bytes.hi)};
  }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.lo, x.lo)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.hi, x.hi))};
  }
#endif
  static INLINE Operand weights(const word* w, int part) { return operand(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return operand(ibroadcast(*x), part);
  }
};

}  // namespace simd

#include "simd_partial.h"
