// Pairs (o, p) and (i, j), packed: the operands of the product that kronecker_core.h makes.
#pragma once
#include "placed.h"

#include <cmath>
#include <limits>

namespace torch_curvature::cpu {

struct Pair {
  int64_t o, p;
};

inline std::vector<Pair> all_pairs(int64_t O, int64_t O2, bool symmetric) {
  std::vector<Pair> pairs;
  for (int64_t o = 0; o < O; ++o)
    for (int64_t p = symmetric ? o : 0; p < O2; ++p) pairs.push_back({o, p});
  return pairs;
}

struct PairTile {
  int64_t i0, i1, j0, j1;
  bool triangle;  // pairs i <= j only
  int64_t columns() const { return triangle ? (i1 - i0) * (i1 - i0 + 1) / 2 : (i1 - i0) * (j1 - j0); }
};

// Tiles of ranges between these bounds; where both sides are the same only those with i <= j.
inline std::vector<PairTile> pair_tiles(const std::vector<int64_t>& left, const std::vector<int64_t>& right,
                                        bool same) {
  std::vector<PairTile> tiles;
  for (size_t i = 0; i + 1 < left.size(); ++i)
    for (size_t j = same ? i : 0; j + 1 < right.size(); ++j)
      tiles.push_back({left[i], left[i + 1], right[j], right[j + 1], same && i == j});
  return tiles;
}

template <class A>
CURVATURE_CLONES bool any_zero(const A* x, int64_t count) {
  int32_t found = 0;  // a sum, which becomes vector code
  for (int64_t k = 0; k < count; ++k) found += x[k] == A(0);
  return found != 0;
}

// Panels of kRows pairs of b, each with the samples that count in it.
template <class A>
struct PairPanels {
  int64_t N, first = 0, count = 0;
  bool skip;                   // samples whose pairs are all zero
  Buffer<A> values;            // [count][N][kRows]
  Buffer<int32_t> index;       // [count][N]
  std::vector<int64_t> depth;  // samples that count; N where all do, and then the index is not needed

  PairPanels(int64_t N, int64_t most, bool skip)
      : N(N), skip(skip), values(most * N * kRows), index(skip ? most * N : 0), depth(most) {}

  // fill(pairs, count, to): the values of up to kRows pairs at all samples, [N][kRows], zero beyond them.
  template <class Fill>
  void pack(const std::vector<Pair>& pairs, int64_t k, const Fill& fill) {
    const int64_t start = (first + k) * kRows;
    A* to = values + k * N * kRows;
    fill(pairs.data() + start, std::min<int64_t>(kRows, pairs.size() - start), to);
    depth[k] = skip ? drop_zeros(to, index + k * N) : N;
  }
  // The samples of panel k in [n0, n1), indexed from n0: where they start, and the depth they make.
  int64_t from(int64_t k, int64_t n) const {
    if (depth[k] == N) return n;
    const int32_t* at = index + k * N;
    return std::lower_bound(at, at + depth[k], static_cast<int32_t>(std::min<int64_t>(n, INT32_MAX))) - at;
  }

 private:
  int64_t drop_zeros(A* rows, int32_t* at) const {
    if (!any_zero<A>(rows, N * kRows)) return N;
    int64_t kept = 0;
    for (int64_t n = 0; n < N; ++n) {
      const A* x = rows + n * kRows;
      bool counts = false;
      for (int64_t c = 0; c < kRows; ++c) counts |= x[c] != A(0);
      at[kept] = static_cast<int32_t>(n);
      if (kept != n)
        for (int64_t c = 0; c < kRows; ++c) rows[kept * kRows + c] = x[c];
      kept += counts;
    }
    return kept;
  }
};

// to[n, c] = b[n, pair c]
template <class T, class A>
CURVATURE_CLONES void copy_pairs(const T* b, int64_t bn, int64_t bo, int64_t bp, const Pair* pairs, int64_t count,
                                 int64_t N, A* __restrict__ to) {
  int64_t at[kRows];
  for (int64_t c = 0; c < count; ++c) at[c] = pairs[c].o * bo + pairs[c].p * bp;
  if (bn == 1) {  // runs of pairs with one o, turned
    if (count < kRows) std::fill(to, to + N * kRows, A(0));
    for (int64_t c = 0, end; c < count; c = end) {
      for (end = c + 1; end < count && pairs[end].o == pairs[c].o;) ++end;
      transpose_all<T, A>(b + at[c], bp, end - c, N, to + c, kRows);
    }
    return;
  }
  if (count == kRows && bp == 1 && pairs[0].o == pairs[kRows - 1].o) {
    for (int64_t n = 0; n < N; ++n, to += kRows)
      for (int64_t c = 0; c < kRows; ++c) to[c] = static_cast<A>(b[n * bn + at[0] + c]);
    return;
  }
  for (int64_t n = 0; n < N; ++n, to += kRows) {
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<A>(b[n * bn + at[c]]);
    for (int64_t c = count; c < kRows; ++c) to[c] = A(0);
  }
}

// packed[n, (i, j)] = a[n, i] a2[n, j] for the pairs of the tile, as panels [columns / kCols][n][kCols], `stride`
// apart.
template <class T, class A>
CURVATURE_CLONES void pack_products(const T* a, int64_t an, int64_t ai, const T* a2, int64_t a2n, int64_t a2j,
                                    PairTile t, int64_t n0, int64_t n1, int64_t stride, A* __restrict__ packed) {
  constexpr int64_t W = kCols<A>, kVector = 64 / sizeof(A);
  alignas(64) A left[kWhole], right[kWhole + 2 * kVector] = {}, row[kWhole * kWhole + W] = {};
  const int64_t columns = t.columns(), panels = (columns + W - 1) / W, height = t.i1 - t.i0, width = t.j1 - t.j0;
  for (int64_t n = n0; n < n1; ++n, packed += W) {
    for (int64_t i = 0; i < height; ++i) left[i] = static_cast<A>(a[n * an + (t.i0 + i) * ai]);
    for (int64_t j = 0; j < width; ++j) right[j] = static_cast<A>(a2[n * a2n + (t.j0 + j) * a2j]);
    A* to = row;
    for (int64_t i = 0; i < height; ++i) {  // in whole vectors: what lies behind a row is written over by the next
      const int64_t first = t.triangle ? i : 0;
      for (int64_t j = first; j < width; j += kVector)
        for (int64_t c = 0; c < kVector; ++c) to[j - first + c] = left[i] * right[j + c];
      to += width - first;
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t c = 0; c < W; ++c) packed[p * stride + c] = row[p * W + c];
  }
}

// Whether leaving out samples with b = 0 changes nothing: 0 times a product of these entries is 0, not NaN.
template <class T>
bool products_are_finite(const T* a, int64_t an, int64_t ai, int64_t N, int64_t I) {
  using A = accumulate_t<T>;
  const A bound = std::sqrt(std::numeric_limits<A>::max());
  bool finite = true;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < I; ++i) finite &= std::abs(static_cast<A>(a[n * an + i * ai])) < bound;
  return finite;
}
}  // namespace torch_curvature::cpu
