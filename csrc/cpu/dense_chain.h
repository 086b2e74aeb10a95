// Samples of a chain of dense layers side by side, in panels [F][kCols]: what its helpers share.
#pragma once
#include "jacobian.h"

#include <cmath>

namespace torch_curvature::cpu {
// Steps, towards the beginning of the chain: a dense layer, slopes of an elementwise function, the result of a ReLU,
// and a place where something is kept.
enum Kind : int64_t { kDense, kSlope, kPositive, kKeep };

template <class T>
CURVATURE_CLONES void multiply(T* __restrict__ x, const T* __restrict__ s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= s[i];
}

template <class T>
CURVATURE_CLONES void keep_positive(T* __restrict__ x, const T* __restrict__ s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = s[i] <= 0 ? T(0) : x[i];
}

// out[c, f] = panel[f, c] for c < count: four by four in registers where that fills them.
template <class T>
CURVATURE_CLONES void unpack(const T* panel, int64_t width, int64_t count, T* out) {
  constexpr int64_t W = kCols<T>;
  int64_t f = 0;
  if constexpr (std::is_same_v<T, float>) {
    typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
    for (; f + 4 <= width; f += 4) {
      const float* x = panel + f * W;
      for (int64_t c = 0; c + 4 <= count; c += 4) {
        auto row = [&](int64_t k) { return *reinterpret_cast<const Four*>(x + k * W + c); };
        auto to = [&](int64_t k) -> Four& { return *reinterpret_cast<Four*>(out + (c + k) * width + f); };
        const Four a = row(0), b = row(1), d = row(2), e = row(3);
        const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                   de = __builtin_shufflevector(d, e, 0, 4, 1, 5), de2 = __builtin_shufflevector(d, e, 2, 6, 3, 7);
        to(0) = __builtin_shufflevector(ab, de, 0, 1, 4, 5);
        to(1) = __builtin_shufflevector(ab, de, 2, 3, 6, 7);
        to(2) = __builtin_shufflevector(ab2, de2, 0, 1, 4, 5);
        to(3) = __builtin_shufflevector(ab2, de2, 2, 3, 6, 7);
      }
      for (int64_t c = count / 4 * 4; c < count; ++c)
        for (int64_t k = 0; k < 4; ++k) out[c * width + f + k] = x[k * W + c];
    }
  }
  for (; f < width; ++f)
    for (int64_t c = 0; c < count; ++c) out[c * width + f] = panel[f * W + c];
}

// out (+)= x^T G for a packed x [depth, width] and a panel G [depth][kCols]: the next panel, its rows rounded up to
// kRows.
template <class T>
void next_panel(TileProduct<T> product, const T* x, int64_t depth, int64_t width, const T* G, T* out, bool add) {
  constexpr int64_t W = kCols<T>;
  for (int64_t i = 0; i < width; i += kRows)
    product(x + i / W * depth * W + i % W, W, G, W, {depth}, out + i * W, std::min(kRows, width - i), W, add);
}

template <class T>
int64_t panel_size(int64_t width) {
  return divide_up(width, kRows) * kRows * kCols<T>;
}
}  // namespace torch_curvature::cpu
