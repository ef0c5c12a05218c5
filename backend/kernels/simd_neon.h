// NEON, 64-bit ARM: sixteen lanes are four registers.
#pragma once

#include <arm_neon.h>

namespace simd {

constexpr const char* name = "neon";

// 4 sums of four registers, 4 weights and an activation leave 11 of the 32 registers for taking
// bf16 pairs apart.
constexpr int tile_rows = 4;
constexpr int tile_vectors = 1;

struct F32 {
  float32x4_t q[4];
};
struct I32 {
  int32x4_t q[4];
};

// Apply `f` to each register of some vectors.
template <class R, class F, class... V>
INLINE R each(const F& f, const V&... v) {
  return {f(v.q[0]...), f(v.q[1]...), f(v.q[2]...), f(v.q[3]...)};
}

INLINE F32 broadcast(float x) {
  float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
INLINE F32 zeros() { return broadcast(0.0f); }
INLINE F32 load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
INLINE void store(float* p, F32 v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.q[i]);
}

INLINE float32x4_t widen(uint16x4_t bits) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16));
}
// To nearest, ties to even; a NaN must not be rounded into an infinity.
INLINE uint16x4_t narrow(float32x4_t v) {
  uint32x4_t bits = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, vdupq_n_u32(0x7fc00000)), 16);
}
INLINE F32 round_to_bf16(F32 v) {
  return each<F32>([](float32x4_t x) { return widen(narrow(x)); }, v);
}
INLINE F32 load(const bf16* p) {
  const uint16_t* q = reinterpret_cast<const uint16_t*>(p);
  return {widen(vld1_u16(q)), widen(vld1_u16(q + 4)), widen(vld1_u16(q + 8)),
          widen(vld1_u16(q + 12))};
}
INLINE void store(bf16* p, F32 v) {
  uint16_t* q = reinterpret_cast<uint16_t*>(p);
  for (int i = 0; i < 4; ++i) vst1_u16(q + 4 * i, narrow(v.q[i]));
}

INLINE F32 operator+(F32 a, F32 b) { return each<F32>(vaddq_f32, a, b); }
INLINE F32 operator-(F32 a, F32 b) { return each<F32>(vsubq_f32, a, b); }
INLINE F32 operator*(F32 a, F32 b) { return each<F32>(vmulq_f32, a, b); }
INLINE F32 operator/(F32 a, F32 b) { return each<F32>(vdivq_f32, a, b); }
INLINE F32 max(F32 a, F32 b) { return each<F32>(vmaxq_f32, a, b); }
INLINE F32 min(F32 a, F32 b) { return each<F32>(vminq_f32, a, b); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return each<F32>(vfmaq_f32, c, a, b); }
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return each<F32>(
      [](float32x4_t x, float32x4_t y, float32x4_t p, float32x4_t q) {
        return vbslq_f32(vcltq_f32(x, y), p, q);
      },
      a, b, yes, no);
}
// `v` in lanes first <= lane < last, `otherwise` in the others.
INLINE F32 keep_lanes(F32 v, int first, int last, F32 otherwise) {
  const int32_t numbers[4] = {0, 1, 2, 3};
  for (int i = 0; i < 4; ++i) {
    int32x4_t lane = vaddq_s32(vld1q_s32(numbers), vdupq_n_s32(4 * i));
    uint32x4_t keep = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(first)),
                                vcltq_s32(lane, vdupq_n_s32(last)));
    v.q[i] = vbslq_f32(keep, v.q[i], otherwise.q[i]);
  }
  return v;
}
INLINE float sum(F32 v) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3])));
}
INLINE float maximum(F32 v) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.q[0], v.q[2]), vmaxq_f32(v.q[1], v.q[3])));
}
INLINE F32 nearest(F32 v) { return each<F32>(vrndnq_f32, v); }
// For whole n. In two steps, because 2^128 is not a float but what it multiplies may be small.
INLINE F32 times_power_of_two(F32 v, F32 n) {
  return each<F32>(
      [](float32x4_t x, float32x4_t exponent) {
        int32x4_t e = vcvtq_s32_f32(exponent), half = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);
        int32x4_t a = vshlq_n_s32(vaddq_s32(half, bias), 23);
        int32x4_t b = vshlq_n_s32(vaddq_s32(vsubq_s32(e, half), bias), 23);
        return vmulq_f32(vmulq_f32(x, vreinterpretq_f32_s32(a)), vreinterpretq_f32_s32(b));
      },
      v, n);
}

INLINE I32 ibroadcast(word x) {
  int32x4_t v = vreinterpretq_s32_u32(vdupq_n_u32(x));
  return {v, v, v, v};
}
INLINE I32 iload(const word* p) {
  const int32_t* q = reinterpret_cast<const int32_t*>(p);
  return {vld1q_s32(q), vld1q_s32(q + 4), vld1q_s32(q + 8), vld1q_s32(q + 12)};
}
INLINE I32 operator+(I32 a, I32 b) { return each<I32>(vaddq_s32, a, b); }
INLINE I32 operator&(I32 a, I32 b) { return each<I32>(vandq_s32, a, b); }
template <int BITS>
INLINE I32 shift_right(I32 v) {
  return each<I32>(
      [](int32x4_t x) {
        return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), BITS));
      },
      v);
}
INLINE int32_t isum(I32 v) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(v.q[0], v.q[2]), vaddq_s32(v.q[1], v.q[3])));
}
INLINE F32 to_float(I32 v) { return each<F32>(vcvtq_f32_s32, v); }
INLINE I32 to_int(F32 v) { return each<I32>(vcvtnq_s32_f32, v); }
INLINE I32 truncate(F32 v) { return each<I32>(vcvtq_s32_f32, v); }
INLINE void store_bytes(int8_t* p, I32 v) {
  int16x8_t low = vcombine_s16(vmovn_s32(v.q[0]), vmovn_s32(v.q[1]));
  int16x8_t high = vcombine_s16(vmovn_s32(v.q[2]), vmovn_s32(v.q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE I32 lookup(const uint8_t* table, I32 v) {
  uint8x16_t all = vld1q_u8(table);
  return each<I32>(
      [all](int32x4_t x) {
        return vreinterpretq_s32_u8(vqtbl1q_u8(all, vreinterpretq_u8_s32(x)));
      },
      v);
}

struct Bf16Words {
  static constexpr int parts = 2;  // the lower of the two numbers, then the upper
  static constexpr int activation_words = 1;
  using Sum = F32;
  using Operand = F32;
  static INLINE float32x4_t half(int32x4_t pair, int part) {
    return vreinterpretq_f32_s32(part == 0 ? vshlq_n_s32(pair, 16)
                                           : vandq_s32(pair, vdupq_n_s32(-0x10000)));
  }
  static INLINE Operand operand(I32 pairs, int part) {
    return each<F32>([part](int32x4_t v) { return half(v, part); }, pairs);
  }
  static INLINE Operand weights(const word* w, int part) { return operand(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return broadcast(vgetq_lane_f32(half(vreinterpretq_s32_u32(vdupq_n_u32(*x)), part), 0));
  }
  static INLINE F32 multiply_add(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};

struct Int8Words {
  static constexpr int activation_words = 1;
  static constexpr int weight_offset = 0;
  using Sum = I32;
  using Operand = I32;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr int parts = 1;
  static INLINE Operand operand(I32 bytes, int) { return bytes; }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return each<I32>(
        [](int32x4_t s, int32x4_t a, int32x4_t b) {
          return vdotq_s32(s, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
        },
        sum, w, x);
  }
#else
  static constexpr int parts = 2;  // even bytes, then odd ones, as 16-bit numbers
  static INLINE Operand operand(I32 bytes, int part) {
    return each<I32>(
        [part](int32x4_t v) {
          int16x8_t pairs = vreinterpretq_s16_s32(v);
          if (part == 0) pairs = vshlq_n_s16(pairs, 8);
          return vreinterpretq_s32_s16(vshrq_n_s16(pairs, 8));
        },
        bytes);
  }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return each<I32>(
        [](int32x4_t s, int32x4_t a, int32x4_t b) {
          int16x8_t p = vreinterpretq_s16_s32(a), q = vreinterpretq_s16_s32(b);
          return vaddq_s32(s, vpaddq_s32(vmull_s16(vget_low_s16(p), vget_low_s16(q)),
                                         vmull_high_s16(p, q)));
        },
        sum, w, x);
  }
#endif
  static INLINE Operand weights(const word* w, int part) { return operand(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return operand(ibroadcast(*x), part);
  }
};

}  // namespace simd

#include "simd_append.h"
#include "simd_partial.h"
