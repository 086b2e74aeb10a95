// Matrices of second derivatives for samples side by side, in panels [F][kCols]: what dense_chain_hessians does to
// them.
#pragma once
#include "dense_chain.h"

namespace torch_curvature::cpu {
enum MoreKinds : int64_t { kInput = kKeep + 1, kTanh, kSigmoid, kBent };

// Panels of a matrix [rows, width], one for each row, `stride` apart; or of a diagonal one, all in the first row.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, stride;
  bool diagonal;
  T* row(int64_t r) const { return data + r * stride; }
};

// Slopes and bends of a function whose result is y, or that are given.
template <class T>
CURVATURE_CLONES void slopes(int64_t kind, T* __restrict__ s, T* __restrict__ bend, int64_t count) {
  if (kind == kPositive)
    for (int64_t i = 0; i < count; ++i) s[i] = s[i] <= 0 ? T(0) : T(1);
  if (kind == kTanh)
    for (int64_t i = 0; i < count; ++i) {
      const T y = s[i];
      s[i] = 1 - y * y, bend[i] = -2 * y * s[i];
    }
  if (kind == kSigmoid)
    for (int64_t i = 0; i < count; ++i) {
      const T y = s[i];
      s[i] = y * (1 - y), bend[i] = s[i] * (1 - 2 * y);
    }
}

// Row r of H: H[r, c] s[r] s[c], the same for H[c, r].
template <class T>
CURVATURE_CLONES void scale_row(T* __restrict__ row, const T* __restrict__ s, int64_t r, int64_t width) {
  constexpr int64_t W = kCols<T>;
  T own[W];
  for (int64_t n = 0; n < W; ++n) own[n] = s[r * W + n];
  for (int64_t c = 0; c < width; ++c)
    for (int64_t n = 0; n < W; ++n) row[c * W + n] *= own[n] * s[c * W + n];
}

template <class T>
CURVATURE_CLONES void add_product(T* __restrict__ to, const T* __restrict__ x, const T* __restrict__ y) {
  for (int64_t n = 0; n < kCols<T>; ++n) to[n] += x[n] * y[n];
}

// A row of a weight times an entry of each sample.
template <class T>
CURVATURE_CLONES void spread_row(T* __restrict__ to, const T* __restrict__ x, const T* __restrict__ w, int64_t entry,
                                 int64_t width) {
  constexpr int64_t W = kCols<T>;
  T own[W];
  for (int64_t n = 0; n < W; ++n) own[n] = x[n];
  for (int64_t c = 0; c < width; ++c)
    for (int64_t n = 0; n < W; ++n) to[c * W + n] = own[n] * w[c * entry];
}

// to[f apart + c] = panel[f, c] for c < count.
template <class T>
CURVATURE_CLONES void copy_lanes(const T* __restrict__ panel, int64_t width, int64_t count, T* __restrict__ to,
                                 int64_t apart) {
  constexpr int64_t W = kCols<T>;
  for (int64_t f = 0; f < width; ++f)
    if (count == W) __builtin_memcpy(to + f * apart, panel + f * W, W * sizeof(T));
    else
      for (int64_t c = 0; c < count; ++c) to[f * apart + c] = panel[f * W + c];
}

template <class T>
void mirror(const Matrix<T>& H, int64_t width) {
  constexpr int64_t W = kCols<T>;
  for (int64_t r = 1; r < width; ++r)
    for (int64_t c = 0; c < r; ++c) std::copy_n(H.row(c) + r * W, W, H.row(r) + c * W);
}
}  // namespace torch_curvature::cpu
