// Loads and stores of fewer than sixteen lanes, for instruction sets without masks.
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

}  // namespace simd
