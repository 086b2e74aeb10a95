// jacobian_gram: out[v, n, w, m] = sum_oi J[v, n, o, i] J2[w, m, o, i], J[v, n] = sum_s g[v, n, s] (x) a[n, s]
//
// Shapes: g [V, N, S, O], a [N, S, I], g2 [V2, N2, S2, O], a2 [N2, S2, I], out [V, N, V2, N2].
// The cheaper by counted multiply-adds of
//   overlaps: sum_st (g_s . g2_t)(a_s . a2_t), tile by tile            N S N2 S2 (I + V V2 O)
//   formed:   J and J2 in chunks that stay in cache, then J J2^T       (V N S + V2 N2 S2) O I + V N V2 N2 O I
//             (gram_of_rows.h where one batch with itself has few rows, gram_of_long_rows.h where J is given)
// Without g2, a2 each pair of rows is met once (half of the above) and written twice: symmetric to the bit.
// Neither an array over pairs of positions nor all of J is stored. Bytes moved: those of the operands and of out.
#include "gram_of_long_rows.h"
#include "gram_of_rows.h"

namespace torch_curvature::cpu {
namespace {

// Samples [first, first + samples) whose positions fill `panels` panels of rows of their own.
struct Group {
  int64_t first, samples, rows, panel, panels;
};

// Packed positions of all samples: for each panel of rows (n, s), a [I][kCols] and for each v, g [O][kCols].
template <class T>
struct Positions {
  using A = accumulate_t<T>;
  const Jacobian<T>& J;
  std::vector<Group> groups;
  int64_t panel_count = 0;
  Buffer<A> a, g;

  explicit Positions(const Jacobian<T>& jacobian, bool threads)
      : J(jacobian),
        groups(grouped(J.size)),
        panel_count(groups.back().panel + groups.back().panels),
        a(panel_count * J.size.I * kCols<A>),
        g(panel_count * J.size.V * J.size.O * kCols<A>) {
    share_tasks(static_cast<int64_t>(groups.size()), threads, [&](int64_t k) { pack(groups[k]); });
  }

  static std::vector<Group> grouped(const JacobianSizes& s) {
    const int64_t each = std::max<int64_t>(1, kCols<A> / s.S);
    std::vector<Group> groups;
    for (int64_t n = 0, panel = 0; n < s.N; n += each) {
      const int64_t samples = std::min(each, s.N - n), wide = panels<A>(samples * s.S);
      groups.push_back({n, samples, samples * s.S, panel, wide});
      panel += wide;
    }
    return groups;
  }

  void pack(const Group& group) {
    const JacobianSizes& s = J.size;
    constexpr int64_t W = kCols<A>;
    for (int64_t p = 0; p < group.panels; ++p) {
      A* to = a + (group.panel + p) * s.I * W;
      gather(J.a, J.an, J.as, J.ai, s.I, group, p, to);
      for (int64_t v = 0; v < s.V; ++v)
        gather(J.g + v * J.gv, J.gn, J.gs, J.go, s.O, group, p, g_panel(group.panel + p, v));
    }
  }

  // Rows (n, s) of one panel, transposed: to[k, row] = x[n, s, k].
  void gather(const T* x, int64_t xn, int64_t xs, int64_t xk, int64_t depth, const Group& group, int64_t p, A* to) {
    const int64_t first = p * kCols<A>, count = std::min(kCols<A>, group.rows - first);
    const T* rows[kCols<A>];
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = first + c;
      rows[c] = x + (group.first + row / J.size.S) * xn + row % J.size.S * xs;
    }
    pack_rows<T, A>(rows, xk, depth, count, to);
  }

  const A* a_panel(int64_t panel) const { return a + panel * J.size.I * kCols<A>; }
  A* g_panel(int64_t panel, int64_t v) const { return g + (panel * J.size.V + v) * J.size.O * kCols<A>; }
};

// sums[n, m] += sum over positions of overlap * inner, for a tile whose rows start at `row` and columns at `col`.
template <class A>
void add_by_sample(const A* overlap, const A* inner, int64_t row, int64_t rows, int64_t S, int64_t col, int64_t cols,
                   int64_t S2, int64_t width, A* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    A* line = sums + (row + r) / S * width;
    const A *x = overlap + r * kCols<A>, *y = inner + r * kCols<A>;
    for (int64_t c = 0; c < cols;) {
      const int64_t m = (col + c) / S2, end = std::min(cols, (m + 1) * S2 - col);
      A sum = 0;
      for (; c < end; ++c) sum += x[c] * y[c];
      line[m] += sum;
    }
  }
}

template <class A>
CURVATURE_CLONES void multiply(const A* __restrict__ x, A* __restrict__ y) {
  for (int64_t k = 0; k < kRows * kCols<A>; ++k) y[k] *= x[k];
}

// Tiles [panels of Q][bands of P] of the products of panels of depth K, in steps that stay in cache.
template <class A, class Left, class Right>
void tiles_of_groups(TileProduct<A> product, const Group& P, const Left& left, const Group& Q, const Right& right,
                     int64_t K, A* tiles) {
  constexpr int64_t W = kCols<A>, kBands = W / kRows, kTile = kRows * W, kStep = 4096 / sizeof(A);
  const int64_t bands = divide_up(P.rows, kRows);
  for (int64_t k = 0; k < K; k += kStep)
    for (int64_t q = 0; q < Q.panels; ++q)
      for (int64_t r = 0; r < bands; ++r)
        product(left(P.panel + r / kBands) + k * W + r % kBands * kRows, W, right(Q.panel + q) + k * W, W,
                {std::min(kStep, K - k)}, tiles + (q * bands + r) * kTile, std::min(kRows, P.rows - r * kRows),
                panel_width<A>(Q.rows, q), k > 0);
}

// All columns (v, w) of the samples of group P by those of group Q; of a group with itself each pair (v, w) once.
template <class T>
void pair_of_groups(const Positions<T>& left, const Group& P, const Positions<T>& right, const Group& Q, bool same,
                    GramOutput<T> out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W;
  const JacobianSizes &s = left.J.size, &z = right.J.size;
  const auto product = tile_product<A>();
  const int64_t bands = divide_up(P.rows, kRows);
  const bool one = same && P.first == Q.first, single = s.S == 1 && z.S == 1;
  Buffer<A> overlaps(bands * Q.panels * kTile), inners(bands * Q.panels * kTile), sums(P.samples * Q.samples);
  tiles_of_groups<A>(
      product, P, [&](int64_t p) { return left.a_panel(p); }, Q, [&](int64_t q) { return right.a_panel(q); }, s.I,
      overlaps);
  for (int64_t v = 0; v < s.V; ++v)
    for (int64_t w = one ? v : 0; w < z.V; ++w) {
      tiles_of_groups<A>(
          product, P, [&](int64_t p) { return left.g_panel(p, v); }, Q, [&](int64_t q) { return right.g_panel(q, w); },
          s.O, inners);
      if (!single) std::fill_n(static_cast<A*>(sums), P.samples * Q.samples, A(0));
      for (int64_t q = 0; q < Q.panels; ++q)
        for (int64_t r = 0; r < bands; ++r) {
          const A* overlap = overlaps + (q * bands + r) * kTile;
          A* inner = inners + (q * bands + r) * kTile;
          const int64_t rows = std::min(kRows, P.rows - r * kRows), cols = panel_width<A>(Q.rows, q);
          if (single) {
            multiply<A>(overlap, inner);
            out.write(inner, W, v, P.first + r * kRows, rows, w, Q.first + q * W, cols, same, one && v == w);
          } else {
            add_by_sample<A>(overlap, inner, r * kRows, rows, s.S, q * W, cols, z.S, Q.samples, sums);
          }
        }
      if (!single) out.write(sums, Q.samples, v, P.first, P.samples, w, Q.first, Q.samples, same, one && v == w);
    }
}

template <class T>
void by_overlaps(const Jacobian<T>& left, const Jacobian<T>& right, bool same, bool threads, GramOutput<T> out) {
  const Positions<T> x(left, threads);
  std::optional<Positions<T>> other;
  if (!same) other.emplace(right, threads);
  const Positions<T>& y = same ? x : *other;
  const int64_t P = static_cast<int64_t>(x.groups.size()), Q = static_cast<int64_t>(y.groups.size());
  share_tasks(P * Q, threads, [&](int64_t task) {
    const int64_t p = task / Q, q = task % Q;
    if (same && p > q) return;
    pair_of_groups<T>(x, x.groups[p], y, y.groups[q], same, out);
  });
}

// One position each: a few outputs at a time, whose panels then go through the same memory.
template <class T>
void by_outputs(Jacobian<T> left, Jacobian<T> right, bool same, bool threads, GramOutput<T> out) {
  const int64_t O = left.size.O, rows = left.size.V * left.size.N + right.size.V * right.size.N;
  // Sums of half types are rounded once.
  const int64_t step = std::is_same_v<T, accumulate_t<T>> ? std::max<int64_t>(4096, (1 << 20) / rows) : O;
  for (int64_t o = 0; o < O; o += step, left.g += step * left.go, right.g += step * right.go) {
    left.size.O = right.size.O = std::min(step, O - o);
    by_overlaps<T>(left, right, same, threads, {out.data, out.N, out.V2, out.N2, out.add || o > 0});
  }
}

template <class T>
void gram_into(const Tensor& g, const Tensor& a, const std::optional<Tensor>& g2, const std::optional<Tensor>& a2,
               const GramSizes& s, bool add, Tensor& out) {
  if (product(s.result) == 0) return;
  const double R = double(s.left.V) * s.left.N, R2 = double(s.right.V) * s.right.N, O = s.left.O, I = s.left.I;
  if (s.left.S * s.right.S * s.left.O * s.left.I == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  const double S = s.left.S, S2 = s.right.S, half = g2 ? 1 : 0.5;
  const double overlaps =
      half * s.left.N * S * s.right.N * S2 * (I + double(s.left.V) * s.right.V * (O + (S * S2 > 1 ? 24 : 8)));
  const double formed = (R * S + (g2 ? R2 * S2 : 0)) * O * I + (R + (g2 ? R2 : 0)) * O * I * 16 + half * R * R2 * O * I;
  const Jacobian<T> left(g, a, s.left), right(g2 ? *g2 : g, a2 ? *a2 : a, s.right);
  const GramOutput<T> to{static_cast<T*>(out.data_ptr()), s.left.N, s.right.V, s.right.N, add};
  const bool threads = std::min(overlaps, formed) > kWorthThreads;
  if (S == 1 && !g2 && worth_long_rows(R, O, I, kLongStep<accumulate_t<T>>))
    return gram_of_long_rows<T>(left, threads, to);
  if (S * S2 == 1) return by_outputs<T>(left, right, !g2, threads, to);
  if (overlaps <= formed) return by_overlaps<T>(left, right, !g2, threads, to);
  if (!g2 && worth_rows<accumulate_t<T>>(R, O, I)) return gram_of_rows<T>(left, threads, to);
  gram_of_formed<T>(left, right, !g2, threads, to);
}

Tensor jacobian_gram(const Tensor& g, const Tensor& a, std::optional<Tensor> g2, std::optional<Tensor> a2) {
  const GramSizes s = check_jacobian_gram(g, a, g2, a2);
  Tensor out = new_result("jacobian_gram", g, s.result);
  dispatch_floating(g.scalar_type(),
                    [&](auto* type) { gram_into<std::remove_pointer_t<decltype(type)>>(g, a, g2, a2, s, false, out); });
  return out;
}

void jacobian_gram_add(const Tensor& g, const Tensor& a, std::optional<Tensor> g2, std::optional<Tensor> a2,
                       Tensor out) {
  const GramSizes s = check_jacobian_gram(g, a, g2, a2);
  check_out("jacobian_gram", out, g, s.result);
  dispatch_floating(g.scalar_type(),
                    [&](auto* type) { gram_into<std::remove_pointer_t<decltype(type)>>(g, a, g2, a2, s, true, out); });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("jacobian_gram", TORCH_BOX(&jacobian_gram));
  m.impl("jacobian_gram_add", TORCH_BOX(&jacobian_gram_add));
}
}  // namespace torch_curvature::cpu
