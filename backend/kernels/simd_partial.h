// Loads and stores of some of the sixteen lanes, for instruction sets without masks.
#pragma once

namespace simd {

template <class E>
INLINE F32 load(const E* p, int count) {
  if (count >= lanes) return load(p);
  E all[lanes] = {};
  std::memcpy(all, p, count * sizeof(E));
  return load(all);
}

template <class E>
INLINE void store(E* p, F32 v, int count) {
  if (count >= lanes) {
    store(p, v);
  } else {
    E all[lanes];
    store(all, v);
    std::memcpy(p, all, count * sizeof(E));
  }
}

INLINE int append_positive(float* to, F32 v) {
  if (!(maximum(v) > 0.0f)) return 0;
  float all[lanes];
  store(all, v);
  int count = 0;
  for (float x : all) {
    to[count] = x;
    count += x > 0.0f;
  }
  return count;
}

}  // namespace simd
