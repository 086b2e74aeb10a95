// out[(o, i), (p, j)] = sum_n sum_st B[n, s, t][o, p] a[n, s, i] a[n, t, j], B[n, s, t] = sum_v sign g_vs g_vt^T: the
// Gauss-Newton block of samples with a few positions each, without a Jacobian.
//
// The terms of (t, s) are the transposes of those of (s, t): with B = B+ + B- and C = a_s a_t^T = C+ + C-, split into
// symmetric and antisymmetric halves, the two add 2 B+ (x) C+ + 2 B- (x) C-. Either is a product of pairs o <= p by
// pairs i <= j; the sum of the two goes to (o, i), (p, j), their difference to (o, j), (p, i). Multiply-adds:
// S (S + 1) / 2 terms s <= t of the one and S (S - 1) / 2 of the other, P^2 / 4 each: N S^2 P^2 / 4 in all. Tasks,
// panels and bytes are those of kronecker_core.h, whose samples are terms (n, s, t) here.
#pragma once
#include "jacobian.h"
#include "kronecker_core.h"

namespace torch_curvature::cpu {

constexpr int64_t kPanels = 16;  // panels of b of one task
constexpr int64_t kEdge = 16;    // edge of a tile of pairs (i, j): rows of a tile fill a cache line of float32

// Tiles of kEdge by kEdge inputs.
inline std::vector<PairTile> square_tiles(int64_t I) {
  std::vector<int64_t> bounds;
  for (int64_t i = 0; i < I; i += kEdge) bounds.push_back(i);
  bounds.push_back(I);
  return pair_tiles(bounds, bounds, true);
}

struct Positions {
  int64_t s, t;
};

// The terms s <= t of every sample, or s < t where the halves are antisymmetric.
struct Terms {
  bool minus;
  std::vector<Positions> of_sample;
  Terms(int64_t S, bool minus) : minus(minus) {
    for (int64_t s = 0; s < S; ++s)
      for (int64_t t = s + minus; t < S; ++t) of_sample.push_back({s, t});
  }
  int64_t each() const { return static_cast<int64_t>(of_sample.size()); }
};

// Halves of B[n, s, t] for pairs [k0, k1) of o <= p in their order, from the columns x = g_s and y = g_t of a sample;
// of what is antisymmetric the diagonal o = p is zero to the bit. held: room for 2 O numbers.
template <class T, class A>
CURVATURE_CLONES void halves_of_columns(const T* x, const T* y, int64_t gv, int64_t go, const T* sign, int64_t sv,
                                        int64_t V, int64_t O, bool minus, int64_t k0, int64_t k1, A* __restrict__ held,
                                        A* __restrict__ line) {
  const A half = x == y ? A(0.5) : A(1);
  A *left = held, *right = held + O;
  std::fill(line, line + k1 - k0, A(0));
  for (int64_t v = 0; v < V; ++v) {
    const A w = sign ? half * static_cast<A>(sign[v * sv]) : half;
    for (int64_t o = 0; o < O; ++o) {
      left[o] = static_cast<A>(x[v * gv + o * go]);
      right[o] = static_cast<A>(y[v * gv + o * go]);
    }
    for (int64_t o = 0, start = 0; o < O && start < k1; start += O - o++) {
      const A of_left = w * left[o], of_right = minus ? -w * right[o] : w * right[o];
      const int64_t first = std::max(k0, start), shift = o - start;
      for (int64_t k = first; k < std::min(k1, start + O - o); ++k)
        line[k - k0] += of_left * right[k + shift] + of_right * left[k + shift];
    }
  }
  if (minus)
    for (int64_t o = 0, start = 0; o < O; start += O - o++)
      if (k0 <= start && start < k1) line[start - k0] = 0;
}

// B of all terms for `count` panels of kRows pairs o <= p from panel `first` on: values [count][terms][kRows].
template <class T, class A>
void pack_columns(const Jacobian<T>& J, const Sign<T>& sign, const Terms& terms, int64_t first, int64_t count,
                  A* values) {
  constexpr int64_t kTerms = 32;
  const JacobianSizes& s = J.size;
  const int64_t k0 = first * kRows, k1 = std::min(s.O * (s.O + 1) / 2, k0 + count * kRows), all = s.N * terms.each();
  share_tasks(divide_up(all, kTerms), double(all) * s.V * (k1 - k0) * 4 > kWorthThreads, [&](int64_t task) {
    Buffer<A> held(2 * s.O), line(count * kRows);
    std::fill(line + (k1 - k0), line + count * kRows, A(0));
    for (int64_t m = task * kTerms; m < std::min(all, (task + 1) * kTerms); ++m) {
      const int64_t n = m / terms.each();
      const Positions at = terms.of_sample[m % terms.each()];
      halves_of_columns<T, A>(J.g_at(0, n) + at.s * J.gs, J.g_at(0, n) + at.t * J.gs, J.gv, J.go,
                              sign.data ? sign.data + n * sign.n : nullptr, sign.v, s.V, s.O, terms.minus, k0, k1, held,
                              line);
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(values + (k * all + m) * kRows, line + k * kRows, kRows * sizeof(A));
    }
  });
}

// Halves of a_s a_t^T (a_s a_s^T itself) for terms [first, first + count) and the pairs (i, j) of a tile, as panels
// [columns / kCols][count][kCols].
template <class T, class A>
CURVATURE_CLONES void pack_halves(const Jacobian<T>& J, const Terms& terms, PairTile t, int64_t first, int64_t count,
                                  A* __restrict__ packed) {
  constexpr int64_t W = kCols<A>;
  A left[2][kEdge], right[2][kEdge], row[kEdge * kEdge + W] = {};
  const int64_t columns = t.columns(), wide = (columns + W - 1) / W, height = t.i1 - t.i0, width = t.j1 - t.j0;
  const A half = A(0.5), sign = terms.minus ? -half : half;
  int64_t n = first / terms.each(), k = first % terms.each();
  for (int64_t m = 0; m < count; ++m) {
    const Positions at = terms.of_sample[k];
    const T *x = J.a_at(n) + at.s * J.as, *y = J.a_at(n) + at.t * J.as;
    for (int64_t i = 0; i < height; ++i) {
      left[0][i] = half * static_cast<A>(x[(t.i0 + i) * J.ai]);
      left[1][i] = sign * static_cast<A>(y[(t.i0 + i) * J.ai]);
    }
    for (int64_t j = 0; j < width; ++j) {
      right[0][j] = static_cast<A>(y[(t.j0 + j) * J.ai]);
      right[1][j] = static_cast<A>(x[(t.j0 + j) * J.ai]);
    }
    A* to = row;
    if (!t.triangle && width == kEdge) {
      for (int64_t i = 0; i < height; ++i, to += kEdge)
        for (int64_t j = 0; j < kEdge; ++j) to[j] = left[0][i] * right[0][j] + left[1][i] * right[1][j];
    } else {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = t.triangle ? i : 0; j < width; ++j)
          *to++ = left[0][i] * right[0][j] + left[1][i] * right[1][j];
    }
    for (int64_t p = 0; p < wide; ++p)
      for (int64_t c = 0; c < W; ++c) packed[(p * count + m) * W + c] = row[p * W + c];
    if (++k == terms.each()) k = 0, ++n;
  }
}

// Writes the two halves' products of one pair (o, p) with a tile, [columns] each, to all the places of sum and
// difference.
template <class T, class A>
CURVATURE_CLONES void scatter_halves(const A* plus, const A* minus, PairTile t, Pair q, KroneckerProblem<T> s) {
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0;
  T sum[2][kEdge][kEdge], difference[2][kEdge][kEdge];  // [i][j] and [j][i]
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = t.triangle ? i : 0; j < width; ++j, ++plus, ++minus) {
      sum[0][i][j] = sum[1][j][i] = static_cast<T>(*plus + *minus);
      difference[0][i][j] = difference[1][j][i] = static_cast<T>(*plus - *minus);
      if (t.triangle && i < j) sum[0][j][i] = sum[1][i][j] = difference[0][i][j];
    }
  each_place(t, q, s, [&](bool transposed, const PlacedRun& rows, const PlacedRun& columns) {
    const auto& values = transposed == (rows.o != q.o) ? sum : difference;
    place_tile(values[transposed][0], kEdge, rows, columns, s.G, s.ld, s.add);
  });
}

// The products of `all` terms with a tile of pairs, for `count` panels of b: sums [count][columns / kCols][kTile].
template <class T, class A>
void multiply_halves(const Jacobian<T>& J, const Terms& terms, const PairTile& t, const A* b, int64_t count,
                     int64_t depth, A* products, A* sums) {
  constexpr int64_t W = kCols<A>, kTile = kRows * W;
  const auto product = tile_product<A>();
  const int64_t columns = t.columns(), wide = divide_up(columns, W), all = J.size.N * terms.each();
  for (int64_t m = 0; m < all; m += depth) {
    const int64_t here = std::min(depth, all - m);
    pack_halves<T, A>(J, terms, t, m, here, products);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t q = 0; q < wide; ++q)
        product(b + (k * all + m) * kRows, kRows, products + q * here * W, W, {here}, sums + (k * wide + q) * kTile,
                kRows, std::min(W, columns - q * W), m > 0);
  }
}

// S > 1
template <class T>
void kronecker_positions(const Jacobian<T>& J, const Sign<T>& sign, T* out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W, kDepth = 2048 / sizeof(A), kPacked = 1 << 25;
  const JacobianSizes& s = J.size;
  const KroneckerProblem<T> problem{J.a, J.a, J.an, J.ai, J.an, J.ai, s.N, s.O, s.O, s.I, s.I, true, true, out};
  const std::vector<Pair> pairs = all_pairs(s.O, s.O, true);
  const std::vector<PairTile> tiles = square_tiles(s.I);
  const Terms plus(s.S, false), minus(s.S, true);
  const int64_t terms = s.N * plus.each(), others = s.N * minus.each(), depth = std::min(terms, kDepth);
  const int64_t all = divide_up(pairs.size(), kRows);
  const int64_t most = std::min(all, std::max<int64_t>(kPanels, kPacked / (terms * kRows * sizeof(A))));
  const bool threads = double(s.N) * s.S * s.S * pairs.size() * s.I * s.I > kWorthThreads;
  Buffer<A> symmetric(most * terms * kRows), antisymmetric(most * others * kRows);
  for (int64_t first = 0; first < all; first += most) {
    const int64_t panels = std::min(most, all - first), runs = divide_up(panels, kPanels);
    pack_columns<T, A>(J, sign, plus, first, panels, symmetric);
    pack_columns<T, A>(J, sign, minus, first, panels, antisymmetric);
    share_tasks(runs * static_cast<int64_t>(tiles.size()), threads, [&](int64_t task) {
      const PairTile& t = tiles[task / runs];
      const int64_t k0 = task % runs * kPanels, count = std::min(panels - k0, kPanels),
                    wide = divide_up(t.columns(), W);
      Buffer<A> products(wide * depth * W), sums(2 * count * wide * kTile), lines(2 * wide * W);
      A* more = sums + count * wide * kTile;
      multiply_halves<T, A>(J, plus, t, symmetric + k0 * terms * kRows, count, depth, products, sums);
      multiply_halves<T, A>(J, minus, t, antisymmetric + k0 * others * kRows, count, depth, products, more);
      for (int64_t k = 0; k < count * kRows; ++k) {
        const size_t pair = (first + k0) * kRows + k;
        if (pair >= pairs.size()) break;
        if (pair + 1 < pairs.size())
          each_place(t, pairs[pair + 1], problem, [&](bool, const PlacedRun& rows, const PlacedRun& columns) {
            fetch_places(rows, columns, problem.G, problem.ld);
          });
        for (int64_t q = 0; q < wide; ++q) {
          const int64_t at = (k / kRows * wide + q) * kTile + k % kRows * W;
          std::memcpy(lines + q * W, sums + at, W * sizeof(A));
          std::memcpy(lines + (wide + q) * W, more + at, W * sizeof(A));
        }
        scatter_halves<T, A>(lines, lines + wide * W, t, pairs[pair], problem);
      }
    });
  }
}
}  // namespace torch_curvature::cpu
