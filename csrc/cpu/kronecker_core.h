// G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j], for b given by a function: the core of kronecker_sum and of
// gauss_newton_block.
//
// One matrix product of the pairs (o, p) of b by the pairs (i, j) of a x a2. Where a2 is a, only i <= j are multiplied;
// where b is symmetric, only o <= p: a quarter of the flops, and every value is written to its mirrored places, so that
// the result is symmetric to the bit. Flops: 2 N (pairs of b) (pairs of a), less what skipping saves: samples whose
// eight pairs in a panel of b are all zero (units that a ReLU switched off) are left out of that panel's product.
// A task is a run of panels of b by a tile of pairs of a, all i <= j of a few inputs and 16 x 16 of many: it forms the
// products a a2 of its tile in the second-level cache, multiplies, and scatters. Bytes to memory: G once, the packed
// pairs of b once for every tile of a.
#pragma once
#include "placed.h"
#include "tile_product.h"

#include <cmath>
#include <limits>
#include <vector>

namespace torch_curvature::cpu {

struct Pair {
  int64_t o, p;
};

// Right operands a [N, I] and a2 [N, I2], and the result: G itself, or its places in a larger matrix.
template <class T>
struct KroneckerProblem {
  const T *a, *a2;
  int64_t an, ai, a2n, a2j;
  int64_t N, O, O2, I, I2;
  bool same, symmetric;  // a2 is a; b[n] is symmetric
  T* G;
  Places rows{0, I, 1, -1}, columns{0, I2, 1, -1};
  int64_t ld = O2 * I2;
  bool add = false;
};

constexpr int64_t kRun = 16;    // panels of b of one task
constexpr int64_t kWhole = 40;  // inputs all of whose pairs i <= j are one tile

struct PairTile {
  int64_t i0, i1, j0, j1;
  bool triangle;  // pairs i <= j only
  int64_t columns() const { return triangle ? (i1 - i0) * (i1 - i0 + 1) / 2 : (i1 - i0) * (j1 - j0); }
};

inline std::vector<PairTile> pair_tiles(int64_t I, int64_t I2, bool same) {
  std::vector<PairTile> tiles;
  for (int64_t i = 0; i < I; i += kEdge)
    for (int64_t j = same ? i : 0; j < I2; j += kEdge)
      tiles.push_back({i, std::min(I, i + kEdge), j, std::min(I2, j + kEdge), same && i == j});
  return tiles;
}

// Panels of kRows pairs of b, each with the samples that count in it.
template <class A>
struct PairPanels {
  int64_t N, first, count;
  Buffer<A> values;            // [count][N][kRows]
  Buffer<int32_t> index;       // [count][N]
  std::vector<int64_t> depth;  // samples that count; N where all do, and then the index is not needed

  PairPanels(int64_t N, int64_t most)
      : N(N), first(0), count(0), values(most * N * kRows), index(most * N), depth(most) {}

  // fill(pairs, count, n, values): the values of up to kRows pairs at sample n.
  template <class Fill>
  void pack(const std::vector<Pair>& pairs, int64_t from, int64_t panels, bool skip, const Fill& fill) {
    first = from, count = panels;
    share_tasks(panels, double(panels) * N * kRows * 4 > kWorthThreads, [&](int64_t k) {
      const Pair* run = pairs.data() + (first + k) * kRows;
      const int64_t width = std::min<int64_t>(kRows, pairs.size() - (first + k) * kRows);
      A* to = values + k * N * kRows;
      int32_t* at = index + k * N;
      int64_t kept = 0;
      for (int64_t n = 0; n < N; ++n) {
        A* x = to + kept * kRows;
        for (int64_t c = 0; c < kRows; ++c) x[c] = 0;
        fill(run, width, n, x);
        bool counts = !skip;
        for (int64_t c = 0; c < kRows; ++c) counts |= x[c] != A(0);
        at[kept] = static_cast<int32_t>(n);
        kept += counts;
      }
      depth[k] = kept;
    });
  }
  // The samples of panel k in [n0, n1), indexed from n0: where they start, and the depth they make.
  int64_t from(int64_t k, int64_t n) const {
    if (depth[k] == N) return n;
    const int32_t* at = index + k * N;
    return std::lower_bound(at, at + depth[k], static_cast<int32_t>(std::min<int64_t>(n, INT32_MAX))) - at;
  }
};

// packed[n, (i, j)] = a[n, i] a2[n, j] for the pairs of the tile, as panels [columns / kCols][n1 - n0][kCols].
template <class T, class A>
CURVATURE_CLONES void pack_products(const T* a, int64_t an, int64_t ai, const T* a2, int64_t a2n, int64_t a2j,
                                    PairTile t, int64_t n0, int64_t n1, A* __restrict__ packed) {
  constexpr int64_t W = kCols<A>;
  A left[kWhole], right[kWhole], row[kWhole * (kWhole + 1) / 2 + W] = {};
  const int64_t columns = t.columns(), panels = (columns + W - 1) / W, height = t.i1 - t.i0, width = t.j1 - t.j0;
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t i = 0; i < height; ++i) left[i] = static_cast<A>(a[n * an + (t.i0 + i) * ai]);
    for (int64_t j = 0; j < width; ++j) right[j] = static_cast<A>(a2[n * a2n + (t.j0 + j) * a2j]);
    A* to = row;
    if (!t.triangle && width == kEdge) {
      for (int64_t i = 0; i < height; ++i, to += kEdge)
        for (int64_t j = 0; j < kEdge; ++j) to[j] = left[i] * right[j];
    } else {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = t.triangle ? i : 0; j < width; ++j) *to++ = left[i] * right[j];
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t c = 0; c < W; ++c) packed[(p * (n1 - n0) + n - n0) * W + c] = row[p * W + c];
  }
}

// Calls f(transposed, rows, columns) for all the places of the products of one pair (o, p) with a tile.
template <class T, class F>
CURVATURE_INLINE void each_place(const PairTile& t, Pair q, const KroneckerProblem<T>& s, const F& f) {
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0;
  const bool off_diagonal = s.same && !t.triangle, twin = s.symmetric && q.o != q.p;
  auto at = [&](bool transposed, int64_t o, int64_t i, int64_t rows, int64_t p, int64_t j, int64_t columns) {
    f(transposed, PlacedRun{s.rows, o, i, rows, s.I}, PlacedRun{s.columns, p, j, columns, s.I2});
  };
  at(false, q.o, t.i0, height, q.p, t.j0, width);
  if (off_diagonal) at(true, q.o, t.j0, width, q.p, t.i0, height);
  if (twin) at(true, q.p, t.j0, width, q.o, t.i0, height);
  if (twin && off_diagonal) at(false, q.p, t.i0, height, q.o, t.j0, width);
}

// Writes the products of one pair (o, p) with a tile, line [columns], to all the places that hold them.
template <class T, class A>
CURVATURE_CLONES void scatter(const A* line, PairTile t, Pair q, KroneckerProblem<T> s) {
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0;
  T tile[kEdge][kEdge], flipped[kEdge][kEdge];  // [i][j] and [j][i]
  if (height == kEdge && width == kEdge) {
    for (int64_t i = 0; i < kEdge; ++i)
      for (int64_t j = 0; j < kEdge; ++j) tile[i][j] = static_cast<T>(line[i * kEdge + j]);
    if (s.same || s.symmetric) transpose_tile<T>(tile, flipped);
  } else {
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) tile[i][j] = flipped[j][i] = static_cast<T>(*line++);
  }
  each_place(t, q, s,
             [&](bool transposed, const PlacedRun& rows, const PlacedRun& columns) __attribute__((always_inline)) {
               place_tile(transposed ? flipped : tile, rows, columns, s.G, s.ld, s.add);
             });
}

// The same for a triangle: what is written is symmetric.
template <class T, class A>
CURVATURE_CLONES void scatter_triangle(const A* line, PairTile t, Pair q, KroneckerProblem<T> s) {
  const int64_t edge = t.i1 - t.i0;
  T tile[kWhole][kWhole];
  for (int64_t i = 0; i < edge; ++i) {
    for (int64_t j = i; j < edge; ++j) tile[i][j] = static_cast<T>(line[j - i]);
    for (int64_t j = i + 1; j < edge; ++j) tile[j][i] = tile[i][j];
    line += edge - i;
  }
  each_place(t, q, s, [&](bool, const PlacedRun& rows, const PlacedRun& columns) __attribute__((always_inline)) {
    place_tile(tile, rows, columns, s.G, s.ld, s.add);
  });
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

template <class T, class Fill>
void kronecker(const KroneckerProblem<T>& s, const Fill& fill) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W, kDepth = 2048 / sizeof(A), kPacked = 1 << 26, kTask = 1 << 18;
  std::vector<Pair> pairs;
  for (int64_t o = 0; o < s.O; ++o)
    for (int64_t p = s.symmetric ? o : 0; p < s.O2; ++p) pairs.push_back({o, p});
  const bool whole = s.same && s.I > 0 && s.I <= kWhole;
  const std::vector<PairTile> tiles =
      whole ? std::vector<PairTile>{{0, s.I, 0, s.I, true}} : pair_tiles(s.I, s.I2, s.same);
  const int64_t all = divide_up(pairs.size(), kRows);
  // Products and sums of a task stay in the second cache, and there are tasks for a few threads.
  const int64_t deepest = whole ? kTask / divide_up(tiles[0].columns(), W) / W / sizeof(A) : kDepth;
  const int64_t depth = divide_up(s.N, std::max<int64_t>(1, divide_up(s.N, deepest)));
  const int64_t run = whole ? std::clamp<int64_t>(all / 4, 1, kRun / 2) : kRun;
  const int64_t most = std::clamp<int64_t>(kPacked / (s.N * kRows * sizeof(A)), kRun, all + kRun);
  const bool threads = double(s.N) * pairs.size() * s.I * s.I2 > kWorthThreads;
  const bool skip = s.N < INT32_MAX && products_are_finite(s.a, s.an, s.ai, s.N, s.I) &&
                    (s.same || products_are_finite(s.a2, s.a2n, s.a2j, s.N, s.I2));
  const auto product = tile_product<A>();
  PairPanels<A> b(s.N, std::min(all, most));
  for (int64_t first = 0; first < all; first += most) {
    b.pack(pairs, first, std::min(most, all - first), skip, fill);
    const int64_t runs = divide_up(b.count, run);
    share_tasks(runs * static_cast<int64_t>(tiles.size()), threads, [&](int64_t task) {
      const PairTile& t = tiles[task / runs];
      const int64_t k0 = task % runs * run, k1 = std::min(b.count, k0 + run);
      const int64_t columns = t.columns(), wide = divide_up(columns, W);
      Buffer<A> products(wide * depth * W), c((k1 - k0) * wide * kTile), line(wide * W);
      for (int64_t n0 = 0; n0 < s.N; n0 += depth) {
        const int64_t n1 = std::min(s.N, n0 + depth);
        pack_products<T, A>(s.a, s.an, s.ai, s.a2, s.a2n, s.a2j, t, n0, n1, products);
        for (int64_t k = k0; k < k1; ++k) {
          const int64_t from = b.from(k, n0), count = b.from(k, n1) - from;
          const Depth samples{count, b.depth[k] == s.N ? nullptr : b.index + k * s.N + from};
          const int64_t rows = std::min<int64_t>(kRows, pairs.size() - (first + k) * kRows);
          // An index counts from the start of a; the panel of products starts at n0.
          const int64_t shift = samples.index ? n0 * W : 0;
          for (int64_t q = 0; q < wide; ++q)
            product(b.values + (k * s.N + from) * kRows, kRows, products + q * (n1 - n0) * W - shift, W, samples,
                    c + ((k - k0) * wide + q) * kTile, rows, std::min(W, columns - q * W), n0 > 0);
        }
      }
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t r = 0; r < kRows; ++r) {
          const size_t pair = (first + k) * kRows + r;
          if (pair >= pairs.size()) break;
          if (pair + 1 < pairs.size())
            each_place(t, pairs[pair + 1], s, [&](bool, const PlacedRun& rows, const PlacedRun& columns) {
              fetch_places(rows, columns, s.G, s.ld);
            });
          for (int64_t q = 0; q < wide; ++q)
            std::memcpy(line + q * W, c + ((k - k0) * wide + q) * kTile + r * W, W * sizeof(A));
          t.triangle ? scatter_triangle<T, A>(line, t, pairs[pair], s) : scatter<T, A>(line, t, pairs[pair], s);
        }
    });
  }
}
}  // namespace torch_curvature::cpu
