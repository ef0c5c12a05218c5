// Plain C++, for every other CPU. The compiler makes of the loops what it can.
#pragma once

namespace simd {

constexpr const char* name = "plain";

constexpr int tile_rows = 2;
constexpr int tile_vectors = 1;

struct F32 {
  float lane[lanes];
};
struct I32 {
  int32_t lane[lanes];
};

// Apply `f` to each lane of some vectors.
template <class R, class F, class... V>
INLINE R each(const F& f, const V&... v) {
  R result;
  for (int i = 0; i < lanes; ++i) result.lane[i] = f(v.lane[i]...);
  return result;
}

// The upper half of a float, rounded to nearest, ties to even. A NaN must not be rounded into an
// infinity.
INLINE uint16_t narrow(float x) {
  word bits = bits_of(x);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float widen(uint16_t bits) { return float_of(static_cast<word>(bits) << 16); }

INLINE F32 broadcast(float x) {
  F32 v;
  for (float& lane : v.lane) lane = x;
  return v;
}
INLINE F32 zeros() { return broadcast(0.0f); }
INLINE F32 load(const float* p) {
  F32 v;
  std::memcpy(v.lane, p, sizeof v);
  return v;
}
INLINE void store(float* p, F32 v) { std::memcpy(p, v.lane, sizeof v); }
INLINE F32 load(const bf16* p) {
  F32 v;
  for (int i = 0; i < lanes; ++i) v.lane[i] = widen(p[i].bits);
  return v;
}
INLINE void store(bf16* p, F32 v) {
  for (int i = 0; i < lanes; ++i) p[i].bits = narrow(v.lane[i]);
}
INLINE F32 round_to_bf16(F32 v) {
  return each<F32>([](float x) { return widen(narrow(x)); }, v);
}

INLINE F32 operator+(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x + y; }, a, b);
}
INLINE F32 operator-(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x - y; }, a, b);
}
INLINE F32 operator*(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x * y; }, a, b);
}
INLINE F32 operator/(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x / y; }, a, b);
}
// Rounded twice: without the instruction, rounding once costs a hundred times as much.
INLINE F32 fma(F32 a, F32 b, F32 c) {
  return each<F32>([](float x, float y, float z) { return x * y + z; }, a, b, c);
}
INLINE F32 max(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x > y ? x : y; }, a, b);
}
INLINE F32 min(F32 a, F32 b) {
  return each<F32>([](float x, float y) { return x < y ? x : y; }, a, b);
}
INLINE F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return each<F32>([](float x, float y, float p, float q) { return x < y ? p : q; }, a, b, yes,
                   no);
}
// `v` in lanes first <= lane < last, `otherwise` in the others.
INLINE F32 keep_lanes(F32 v, int first, int last, F32 otherwise) {
  for (int i = 0; i < lanes; ++i)
    if (i < first || i >= last) v.lane[i] = otherwise.lane[i];
  return v;
}
INLINE float sum(F32 v) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
INLINE float maximum(F32 v) {
  float largest = v.lane[0];
  for (float x : v.lane) largest = x > largest ? x : largest;
  return largest;
}
INLINE F32 nearest(F32 v) {
  return each<F32>([](float x) { return std::nearbyint(x); }, v);
}
INLINE F32 times_power_of_two(F32 v, F32 n) {
  return each<F32>([](float x, float e) { return std::ldexp(x, static_cast<int>(e)); }, v, n);
}

INLINE I32 ibroadcast(word x) {
  I32 v;
  for (int32_t& lane : v.lane) lane = static_cast<int32_t>(x);
  return v;
}
INLINE I32 iload(const word* p) {
  I32 v;
  std::memcpy(v.lane, p, sizeof v);
  return v;
}
INLINE I32 operator+(I32 a, I32 b) {
  return each<I32>([](int32_t x, int32_t y) { return x + y; }, a, b);
}
INLINE I32 operator&(I32 a, I32 b) {
  return each<I32>([](int32_t x, int32_t y) { return x & y; }, a, b);
}
template <int BITS>
INLINE I32 shift_right(I32 v) {
  return each<I32>([](int32_t x) { return static_cast<int32_t>(static_cast<word>(x) >> BITS); },
                   v);
}
INLINE int32_t isum(I32 v) {
  int32_t total = 0;
  for (int32_t x : v.lane) total += x;
  return total;
}
INLINE F32 to_float(I32 v) {
  return each<F32>([](int32_t x) { return static_cast<float>(x); }, v);
}
// NaN, of which no integer can be made, becomes zero.
INLINE I32 to_int(F32 v) {
  return each<I32>(
      [](float x) { return x == x ? static_cast<int32_t>(std::nearbyint(x)) : int32_t{0}; }, v);
}
INLINE I32 truncate(F32 v) {
  return each<I32>([](float x) { return static_cast<int32_t>(x); }, v);
}
INLINE void store_bytes(int8_t* p, I32 v) {
  for (int i = 0; i < lanes; ++i) p[i] = static_cast<int8_t>(v.lane[i]);
}
INLINE I32 lookup(const uint8_t* table, I32 v) {
  return each<I32>(
      [table](int32_t x) {
        word found = 0;
        for (int shift = 0; shift < 32; shift += 8)
          found |= static_cast<word>(table[static_cast<word>(x) >> shift & 15]) << shift;
        return static_cast<int32_t>(found);
      },
      v);
}

struct Bf16Words {
  static constexpr int parts = 2;  // the lower of the two numbers, then the upper
  static constexpr int activation_words = 1;
  using Sum = F32;
  using Operand = F32;
  static INLINE float half(word pair, int part) {
    return float_of(part == 0 ? pair << 16 : pair & 0xffff0000);
  }
  static INLINE Operand weights(const word* w, int part) {
    F32 v;
    for (int i = 0; i < lanes; ++i) v.lane[i] = half(w[i], part);
    return v;
  }
  static INLINE Operand activations(const word* x, int part) { return broadcast(half(*x, part)); }
  static INLINE F32 multiply_add(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};

struct Int8Words {
  static constexpr int parts = 4;  // byte by byte
  static constexpr int activation_words = 1;
  static constexpr int weight_offset = 0;
  using Sum = I32;
  using Operand = I32;
  static INLINE Operand operand(I32 bytes, int part) {
    return each<I32>(
        [part](int32_t x) {
          return static_cast<int32_t>(static_cast<int8_t>(static_cast<word>(x) >> (8 * part)));
        },
        bytes);
  }
  static INLINE Operand weights(const word* w, int part) { return operand(iload(w), part); }
  static INLINE Operand activations(const word* x, int part) {
    return operand(ibroadcast(*x), part);
  }
  static INLINE I32 multiply_add(I32 sum, Operand w, Operand x) {
    return each<I32>([](int32_t s, int32_t a, int32_t b) { return s + a * b; }, sum, w, x);
  }
};

}  // namespace simd

#include "simd_append.h"
#include "simd_partial.h"
