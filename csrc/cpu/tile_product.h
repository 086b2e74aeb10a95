// The innermost product, shared by all kernels that contract tiles: c[r, q] (+)= sum_k a[k, r] b[k, q].
//
// Shapes: a [depth, kRows] with rows lda apart, b [depth, kCols] with rows ldb apart, c [kRows, kCols] in cache. Both
// operands run along depth, so panels of either kind have one layout: [depth][kCols], eight columns of which make an a.
// The tile of c stays in registers: 2 kRows kCols flops a step for kRows + kCols elements read from the first caches.
#pragma once
#include "simd.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace torch_curvature::cpu {
constexpr int64_t kRows = 8;
template <class A>
constexpr int64_t kCols = 128 / sizeof(A);

// Which rows of b meet the rows of a: row `index[k]` where an index is given (a holds only the rows that count).
struct Depth {
  int64_t count;
  const int32_t* index = nullptr;
};

#define CURVATURE_TILE_NAME tile_generic
#define CURVATURE_TILE_TARGET
#define CURVATURE_TILE_BYTES 16
#define CURVATURE_TILE_ROWS 4
#define CURVATURE_TILE_TALL 4
#include "tile_product_body.h"

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CURVATURE_TILE_NAME tile_v3
#define CURVATURE_TILE_TARGET __attribute__((target("arch=x86-64-v3")))
#define CURVATURE_TILE_BYTES 32
#define CURVATURE_TILE_ROWS 4
#define CURVATURE_TILE_TALL 4
#include "tile_product_body.h"

#define CURVATURE_TILE_NAME tile_v4
#define CURVATURE_TILE_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define CURVATURE_TILE_BYTES 64
#define CURVATURE_TILE_ROWS 8
#define CURVATURE_TILE_TALL 12
#include "tile_product_body.h"
#endif

template <class A>
using TileProduct = void (*)(const A*, int64_t, const A*, int64_t, Depth, A*, int64_t, int64_t, bool);
template <class A>
using TallProduct = void (*)(const A*, int64_t, const A*, int64_t, int64_t, A*, int64_t, int64_t, bool);
constexpr int64_t kTall = 12;  // most rows that a tall product holds in registers
template <class A>
using TileProductInPlace = void (*)(const A*, int64_t, const int64_t*, const A*, int64_t, int64_t, A*, int64_t,
                                    int64_t);

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CURVATURE_BEST(suffix)                                                \
  __builtin_cpu_supports("x86-64-v4")   ? &CURVATURE_JOIN(tile_v4, suffix)<A> \
  : __builtin_cpu_supports("x86-64-v3") ? &CURVATURE_JOIN(tile_v3, suffix)<A> \
                                        : &CURVATURE_JOIN(tile_generic, suffix)<A>
#else
#define CURVATURE_BEST(suffix) &CURVATURE_JOIN(tile_generic, suffix)<A>
#endif

// The best for this processor: (a, lda, b, ldb, depth, c, rows, cols, add). Only the first `rows` and `cols` of c are
// needed; what lies beyond may be overwritten.
template <class A>
TileProduct<A> tile_product() {
  static const TileProduct<A> best = CURVATURE_BEST();
  return best;
}

// The same with rows of a where they lie, a[k, r] at a[k step + offsets[r]]: (a, step, offsets, b, ldb, depth, c, rows,
// cols). What is contiguous along depth is read as fast as what has been packed.
template <class A>
TileProductInPlace<A> tile_product_in_place() {
  static const TileProductInPlace<A> best = CURVATURE_BEST(_in_place);
  return best;
}

// Any number of rows and no others: (a, lda, b, ldb, depth, c, rows, cols, add). Columns as tile_product.
template <class A>
TallProduct<A> tall_product() {
  static const TallProduct<A> best = CURVATURE_BEST(_tall);
  return best;
}
#undef CURVATURE_BEST

// A copy of K numbers in registers, where the compiler would call memcpy.
template <class T, int64_t K>
CURVATURE_INLINE void copy_some(const T* from, T* to) {
  typedef unsigned char Bytes __attribute__((vector_size(K * sizeof(T)), aligned(1), may_alias));
  *reinterpret_cast<Bytes*>(to) = *reinterpret_cast<const Bytes*>(from);
}

// Panels [panels][depth][kCols] of a matrix [depth, columns] whose rows are contiguous, read row by row.
template <class T, class A>
CURVATURE_CLONES void pack_rows_in_order(const T* x, int64_t depth, int64_t depth_stride, int64_t columns,
                                         A* __restrict__ out) {
  constexpr int64_t W = kCols<A>;
  const int64_t full = columns / W, rest = columns % W;
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = x + k * depth_stride;
    for (int64_t p = 0; p < full; ++p) {
      A* to = out + (p * depth + k) * W;
      if constexpr (std::is_same_v<T, A>)
        copy_some<A, W / 2>(row + p * W, to), copy_some<A, W / 2>(row + p * W + W / 2, to + W / 2);
      else
        for (int64_t c = 0; c < W; ++c) to[c] = static_cast<A>(row[p * W + c]);
    }
    if (rest == 0) continue;
    A* to = out + (full * depth + k) * W;
    for (int64_t c = 0; c < rest; ++c) to[c] = static_cast<A>(row[full * W + c]);
    for (int64_t c = rest; c < W; ++c) to[c] = A(0);
  }
}

// Four rows of four floats, transposed in registers of the smallest instruction set, to rows `apart`.
CURVATURE_INLINE void transpose_four(const float* x0, const float* x1, const float* x2, const float* x3, float* to,
                                     int64_t apart) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const Four a = *reinterpret_cast<const Four*>(x0), b = *reinterpret_cast<const Four*>(x1),
             c = *reinterpret_cast<const Four*>(x2), d = *reinterpret_cast<const Four*>(x3);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7),
             cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + apart) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to + 2 * apart) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + 3 * apart) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
}
CURVATURE_INLINE void transpose_four(const float* x, int64_t stride, float* to, int64_t apart) {
  transpose_four(x, x + stride, x + 2 * stride, x + 3 * stride, to, apart);
}

// to[c apart + r] = x[r stride + c], four by four in registers where both are float32 and contiguous that far.
template <class T, class A>
CURVATURE_INLINE void transpose_all(const T* x, int64_t stride, int64_t rows, int64_t columns, A* __restrict__ to,
                                    int64_t apart) {
  int64_t r = 0;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<A, float>)
    for (; r + 4 <= rows; r += 4) {
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4) transpose_four(x + r * stride + c, stride, to + c * apart + r, apart);
      for (; c < columns; ++c)
        for (int64_t k = r; k < r + 4; ++k) to[c * apart + k] = x[k * stride + c];
    }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * apart + r] = static_cast<A>(x[r * stride + c]);
}

// out[k kCols + c] = x[c stride + k]: `count` rows that are contiguous along depth, in runs long enough for the
// processor to read ahead and short enough for the lines written to stay in the first cache.
template <class T, class A>
CURVATURE_INLINE void transpose_rows(const T* x, int64_t stride, int64_t count, int64_t depth, A* out) {
  constexpr int64_t W = kCols<A>, kStep = 128;
  for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
    const int64_t k1 = std::min(depth, k0 + kStep), whole = k0 + (k1 - k0) / 4 * 4;
    int64_t c = 0;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<A, float>)
      for (; c + 4 <= count; c += 4) {
        for (int64_t k = k0; k < whole; k += 4) transpose_four(x + c * stride + k, stride, out + k * W + c, W);
        for (int64_t k = whole; k < k1; ++k)
          for (int64_t r = c; r < c + 4; ++r) out[k * W + r] = static_cast<A>(x[k + r * stride]);
      }
    for (; c < count; ++c)
      for (int64_t k = k0; k < k1; ++k) out[k * W + c] = static_cast<A>(x[k + c * stride]);
  }
}

// out[k, c] = x[k depth_stride + c stride] for c < count, zero up to kCols.
template <class T, class A>
CURVATURE_CLONES void pack_panel(const T* x, int64_t depth, int64_t depth_stride, int64_t stride, int64_t count,
                                 A* __restrict__ out) {
  constexpr int64_t W = kCols<A>;
  if (depth_stride == 1 && stride != 1) {
    if (count < W) std::fill(out, out + depth * W, A(0));
    return transpose_rows<T, A>(x, stride, count, depth, out);
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < count; ++c) out[k * W + c] = static_cast<A>(x[k * depth_stride + c * stride]);
    for (int64_t c = count; c < W; ++c) out[k * W + c] = A(0);
  }
}

// out[k, c] = rows[c][k stride] for c < count, zero up to kCols: rows gathered from anywhere, transposed.
template <class T, class A>
CURVATURE_CLONES void pack_rows(const T* const* rows, int64_t stride, int64_t depth, int64_t count,
                                A* __restrict__ out) {
  constexpr int64_t W = kCols<A>, kStep = 128;
  if (count < W) std::fill(out, out + depth * W, A(0));
  for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
    const int64_t k1 = std::min(depth, k0 + kStep), whole = k0 + (k1 - k0) / 4 * 4;
    int64_t c = 0;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<A, float>)
      for (; stride == 1 && c + 4 <= count; c += 4) {
        for (int64_t k = k0; k < whole; k += 4)
          transpose_four(rows[c] + k, rows[c + 1] + k, rows[c + 2] + k, rows[c + 3] + k, out + k * W + c, W);
        for (int64_t k = whole; k < k1; ++k)
          for (int64_t r = c; r < c + 4; ++r) out[k * W + r] = rows[r][k];
      }
    for (; c < count; ++c)
      for (int64_t k = k0; k < k1; ++k) out[k * W + c] = static_cast<A>(rows[c][k * stride]);
  }
}

// packed[k kCols + lane] = rows[lane stride + k] for L rows: lanes of a panel.
template <class A, int64_t L>
CURVATURE_CLONES void transpose_lanes(const A* rows, int64_t stride, int64_t depth, A* __restrict__ packed) {
  transpose_rows<A, A>(rows, stride, L, depth, packed);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
}  // namespace torch_curvature::cpu
