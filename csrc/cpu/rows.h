// Rows of contiguous numbers: their inner products, and normalised by what is known of them.
#pragma once
#include "simd.h"

namespace torch_curvature::cpu {

// sum_k x[k] y[k], in as many partial sums as a vector has lanes: compilers keep the order of a single one.
template <class T>
CURVATURE_CLONES T product(const T* x, const T* y, int64_t count) {
  constexpr int64_t L = 64 / sizeof(T);
  T lanes[L] = {}, sum = 0;
  int64_t k = 0;
  for (; k + L <= count; k += L)
    for (int64_t l = 0; l < L; ++l) lanes[l] += x[k + l] * y[k + l];
  for (; k < count; ++k) sum += x[k] * y[k];
  for (int64_t l = 0; l < L; ++l) sum += lanes[l];
  return sum;
}

// to[k] = (x[k] - mean) scale
template <class T>
CURVATURE_CLONES void normalise(const T* __restrict__ x, T mean, T scale, int64_t count, T* __restrict__ to) {
  for (int64_t k = 0; k < count; ++k) to[k] = (x[k] - mean) * scale;
}
}  // namespace torch_curvature::cpu
