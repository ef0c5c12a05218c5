// AVX-512, with its bf16 and int8 dot products where the CPU has them.
#pragma once

#include <immintrin.h>

namespace simd {

#if defined(__AVX512BF16__)
constexpr const char* name = "avx512_bf16";
#else
constexpr const char* name = "avx512";
#endif

// 6 x 4 sums, 4 weights and an activation take 29 of the 32 registers.
constexpr int tile_rows = 6;
constexpr int tile_vectors = 4;

using F32 = __m512;
typedef int32_t I32 __attribute__((vector_size(64)));

INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

INLINE F32 zeros() { return _mm512_setzero_ps(); }
INLINE F32 broadcast(float x) { return _mm512_set1_ps(x); }
INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F32 load(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
// Storing under a mask is slow on some CPUs (Zen), even when nothing is masked.
INLINE void store(float* p, F32 v, int count) {
  if (count >= lanes)
    store(p, v);
  else
    _mm512_mask_storeu_ps(p, first_lanes(count), v);
}

INLINE F32 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE __m256i narrow(F32 v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  // To nearest, ties to even; a NaN must not be rounded into an infinity.
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                             _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
INLINE F32 round_to_bf16(F32 v) { return widen(narrow(v)); }
INLINE F32 load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE F32 load(const bf16* p, int count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
INLINE void store(bf16* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}
INLINE void store(bf16* p, F32 v, int count) {
  if (count >= lanes)
    store(p, v);
  else
    _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(v));
}

// + - * / are the compiler's own for __m512.
INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// `v` in lanes first <= lane < last, `otherwise` in the others.
INLINE F32 keep_lanes(F32 v, int first, int last, F32 otherwise) {
  if (first >= lanes || last <= 0) return otherwise;
  __mmask16 keep = first_lanes(last) & ~first_lanes(first < 0 ? 0 : first);
  return _mm512_mask_blend_ps(keep, otherwise, v);
}
INLINE int append_positive(float* to, F32 v) {
  __mmask16 positive = _mm512_cmp_ps_mask(v, zeros(), _CMP_GT_OQ);
  // In the register: compressing into memory takes a hundred cycles on some CPUs (Zen 4).
  store(to, _mm512_maskz_compress_ps(positive, v));
  return __builtin_popcount(positive);
}
INLINE float sum(F32 v) { return _mm512_reduce_add_ps(v); }
INLINE float maximum(F32 v) { return _mm512_reduce_max_ps(v); }
INLINE F32 nearest(F32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
INLINE F32 times_power_of_two(F32 v, F32 n) { return _mm512_scalef_ps(v, n); }

// + and & are the compiler's own for vectors of int32_t. Not so for __m512i, whose lanes are of
// 64 bits, and a struct around it would not stay in registers.
INLINE I32 ibroadcast(word x) { return (I32)_mm512_set1_epi32(static_cast<int>(x)); }
INLINE I32 iload(const word* p) { return (I32)_mm512_loadu_si512(p); }
template <int BITS>
INLINE I32 shift_right(I32 v) {
  return (I32)_mm512_srli_epi32((__m512i)v, BITS);
}
INLINE int32_t isum(I32 v) { return _mm512_reduce_add_epi32((__m512i)v); }
INLINE F32 to_float(I32 v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE I32 to_int(F32 v) { return (I32)_mm512_cvtps_epi32(v); }
INLINE I32 truncate(F32 v) { return (I32)_mm512_cvttps_epi32(v); }
INLINE void store_bytes(int8_t* p, I32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
}
INLINE I32 lookup(const uint8_t* table, I32 v) {
  __m128i once = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (I32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(once), (__m512i)v);
}

#if defined(__AVX512BF16__)
struct Bf16Words {
  static constexpr int parts = 1;
  static constexpr int activation_words = 1;
  using Sum = F32;
  using Operand = __m512bh;
  static INLINE Operand weights(const word* w, int) { return (Operand)iload(w); }
  static INLINE Operand activations(const word* x, int) { return (Operand)ibroadcast(*x); }
  static INLINE F32 multiply_add(F32 sum, Operand w, Operand x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
};
#else
struct Bf16Words {
  static constexpr int parts = 2;  // the lower of the two numbers, then the upper
  static constexpr int activation_words = 1;
  using Sum = F32;
  using Operand = F32;
  static INLINE Operand half(I32 pair, int part) {
    return (F32)(part == 0 ? pair << 16 : pair & ibroadcast(0xffff0000));
  }
  static INLINE Operand weights(const word* w, int part) { return half(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return half(ibroadcast(*x), part);
  }
  static INLINE F32 multiply_add(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};
#endif

struct Int8Words {
  static constexpr int activation_words = 1;
  using Sum = I32;
  using Operand = I32;
#if defined(__AVX512VNNI__)
  static constexpr int parts = 1;
  static constexpr int weight_offset = 128;  // the instruction wants unsigned weights
  static INLINE Operand operand(I32 bytes, int) { return bytes; }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
#else
  static constexpr int parts = 2;  // even bytes, then odd ones, as 16-bit numbers
  static constexpr int weight_offset = 0;
  static INLINE Operand operand(I32 bytes, int part) {
    __m512i pairs = (__m512i)bytes;
    return (I32)_mm512_srai_epi16(part == 0 ? _mm512_slli_epi16(pairs, 8) : pairs, 8);
  }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return sum + (I32)_mm512_madd_epi16((__m512i)w, (__m512i)x);
  }
#endif
  static INLINE Operand weights(const word* w, int part) { return operand(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return operand(ibroadcast(*x), part);
  }
};

}  // namespace simd
