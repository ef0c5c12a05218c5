// Choosing lanes, for instruction sets that cannot move lanes together.
#pragma once

namespace simd {

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
