// Numbering of pairs: what a row or column of a packed product stands for.
#pragma once
#include <cmath>

#include "launch.cuh"

namespace torch_curvature::cuda {

struct Pair {
  int first, second;
};

// The t-th pair (i, j), i >= j >= 0, in order of i, then j.
__host__ __device__ inline void triangle(int64_t t, int64_t& i, int64_t& j) {
  i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) * 0.5);
  while (i * (i + 1) / 2 > t) --i;
  while ((i + 1) * (i + 2) / 2 <= t) ++i;
  j = t - i * (i + 1) / 2;
}
// Pairs of `first` by `second` things; `packed`: unordered pairs of one set.
__device__ __forceinline__ Pair nth_pair(int64_t t, int64_t second, bool packed) {
  int64_t i, j;
  if (packed) triangle(t, i, j);
  else i = t / second, j = t - i * second;
  return {static_cast<int>(i), static_cast<int>(j)};
}
__host__ __device__ constexpr int64_t count_pairs(int64_t first, int64_t second, bool packed) {
  return packed ? first * (first + 1) / 2 : first * second;
}
}  // namespace torch_curvature::cuda
