// jacobian_norms: out[v, n] = sum_oi J[v, n, o, i]^2, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
//
// Shapes: g [V, N, S, O], a [N, S, I], out [V, N]. The cheapest by counted multiply-adds of
//   S = 1: |g|^2 |a|^2                                                                V N O + N I
//   Gram:  sum_st (g_s . g_t)(a_s . a_t), tile by tile, each s <= t once              N (V O + I) S (S + 1) / 2
//   sum:   J[v, n] tile by tile, each squared and summed as it leaves the registers   V N S O I
// Nothing of size S x S or O x I is stored. Bytes moved: those of g and a, once.
#include "jacobian.h"

namespace torch_curvature::cpu {
namespace {

template <class T, class A>
CURVATURE_CLONES A sum_of_squares(const T* x, int64_t count, int64_t stride) {
  constexpr int64_t kLanes = 32;
  A lanes[kLanes] = {}, tail = 0;
  int64_t k = 0;
  if (stride == 1)
    for (; k + kLanes <= count; k += kLanes)
      for (int64_t c = 0; c < kLanes; ++c) lanes[c] += static_cast<A>(x[k + c]) * static_cast<A>(x[k + c]);
  for (; k < count; ++k) tail += static_cast<A>(x[k * stride]) * static_cast<A>(x[k * stride]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t c = 0; c < width; ++c) lanes[c] += lanes[c + width];
  return lanes[0] + tail;
}

// lanes[c] += w sum_r x[r, c] y[r, c] over the rows and columns of a tile that count.
template <class A>
CURVATURE_CLONES void add_products(const A* __restrict__ x, const A* __restrict__ y, int64_t rows, int64_t cols, A w,
                                   A* __restrict__ lanes) {
  A sum[kCols<A>] = {};
  if (cols == kCols<A>)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kCols<A>; ++c) sum[c] += x[r * kCols<A> + c] * y[r * kCols<A> + c];
  else
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) sum[c] += x[r * kCols<A> + c] * y[r * kCols<A> + c];
  for (int64_t c = 0; c < kCols<A>; ++c) lanes[c] += w * sum[c];
}

template <class A>
A total(const A* lanes) {
  A sum = 0;
  for (int64_t c = 0; c < kCols<A>; ++c) sum += lanes[c];
  return sum;
}

template <class T>
void one_position(const Jacobian<T>& J, T* out) {
  using A = accumulate_t<T>;
  const JacobianSizes& s = J.size;
  parallel_over(s.N, s.V * s.O + s.I, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const A of_a = sum_of_squares<T, A>(J.a_at(n), s.I, J.ai);
      for (int64_t v = 0; v < s.V; ++v)
        out[v * s.N + n] = static_cast<T>(sum_of_squares<T, A>(J.g_at(v, n), s.O, J.go) * of_a);
    }
  });
}

// Columns [v0, v1) of one sample through the overlaps of its positions.
template <class T, class A>
void by_gram(const Jacobian<T>& J, int64_t n, int64_t v0, int64_t v1, T* out) {
  constexpr int64_t W = kCols<A>, kBands = W / kRows;
  const JacobianSizes& s = J.size;
  const int64_t columns = panels<A>(s.S), each = columns * s.O * W;
  const auto product = tile_product<A>();
  Buffer<A> ap(columns * s.I * W), gp((v1 - v0) * each), overlap(kRows * W), inner(kRows * W), lanes((v1 - v0) * W);
  std::fill_n(static_cast<A*>(lanes), (v1 - v0) * W, A(0));
  pack_panels<T, A>(J.a_at(n), s.I, J.ai, s.S, J.as, ap);
  for (int64_t v = v0; v < v1; ++v) pack_panels<T, A>(J.g_at(v, n), s.O, J.go, s.S, J.gs, gp + (v - v0) * each);
  for (int64_t q = 0; q < columns; ++q)
    for (int64_t r = 0; r < std::min((q + 1) * kBands, divide_up(s.S, kRows)); ++r) {
      const int64_t rows = std::min(kRows, s.S - r * kRows), cols = panel_width<A>(s.S, q);
      const A twice = r / kBands < q ? 2 : 1;  // both orders of a pair (s, t), except in the blocks on the diagonal
      packed_tile<A>(product, ap, r, s.S, ap, q, s.S, s.I, overlap);
      for (int64_t v = 0; v < v1 - v0; ++v) {
        packed_tile<A>(product, gp + v * each, r, s.S, gp + v * each, q, s.S, s.O, inner);
        add_products<A>(overlap, inner, rows, cols, twice, lanes + v * W);
      }
    }
  for (int64_t v = v0; v < v1; ++v) out[v * s.N + n] = static_cast<T>(total<A>(lanes + (v - v0) * W));
}

// Columns [v0, v1) of one sample through the tiles of J.
template <class T, class A>
void by_sum(const Jacobian<T>& J, int64_t n, int64_t v0, int64_t v1, T* out) {
  constexpr int64_t W = kCols<A>;
  const JacobianSizes& s = J.size;
  const auto product = tile_product<A>();
  Buffer<A> ap(panels<A>(s.I) * s.S * W), gp(panels<A>(s.O) * s.S * W), tile(kRows * W);
  pack_panels<T, A>(J.a_at(n), s.S, J.as, s.I, J.ai, ap);
  for (int64_t v = v0; v < v1; ++v) {
    A lanes[W] = {};
    pack_panels<T, A>(J.g_at(v, n), s.S, J.gs, s.O, J.go, gp);
    for (int64_t q = 0; q < panels<A>(s.I); ++q)
      for (int64_t r = 0; r < divide_up(s.O, kRows); ++r) {
        packed_tile<A>(product, gp, r, s.O, ap, q, s.I, s.S, tile);
        add_products<A>(tile, tile, std::min(kRows, s.O - r * kRows), panel_width<A>(s.I, q), A(1), lanes);
      }
    out[v * s.N + n] = static_cast<T>(total<A>(lanes));
  }
}

template <class T>
void norms(const Jacobian<T>& J, T* out) {
  using A = accumulate_t<T>;
  const JacobianSizes& s = J.size;
  if (s.S == 1) return one_position<T>(J, out);
  // Multiply-adds of one sample, in whole tiles, with what it takes to pack the operands and to use a tile.
  const double V = s.V, W = kCols<A>, S = s.S, O = s.O, I = s.I, bands = divide_up(s.S, kRows);
  const double pairs = s.S <= kCols<A> ? bands : bands * (panels<A>(s.S) + 1) / 2, tile = kRows * W;
  const double gram = pairs * tile * (V * (O + 16) + I) + 16 * S * (V * O + I);
  const double sum = V * divide_up(s.O, kRows) * panels<A>(s.I) * tile * (S + 12) + 8 * S * (V * O + I);
  const bool whole = s.N >= 16;  // enough samples to share: a task is a sample, else a column of one
  const int64_t step = whole ? std::max<int64_t>(1, std::min(s.V, (1 << 20) / std::max<int64_t>(1, s.S * s.O))) : 1;
  const int64_t steps = divide_up(s.V, step);
  share_tasks(s.N * steps, s.N * std::min(gram, sum) > kWorthThreads, [&](int64_t task) {
    const int64_t n = task / steps, v0 = task % steps * step, v1 = std::min(s.V, v0 + step);
    gram < sum ? by_gram<T, A>(J, n, v0, v1, out) : by_sum<T, A>(J, n, v0, v1, out);
  });
}

Tensor jacobian_norms(const Tensor& g, const Tensor& a) {
  const JacobianSizes s = check_jacobian_norms(g, a);
  Tensor out = new_result("jacobian_norms", g, {s.V, s.N});
  if (s.V * s.N == 0) return out;
  if (s.S * s.O * s.I == 0) return torch::stable::zero_(out);
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    norms<T>(Jacobian<T>(g, a, s), static_cast<T*>(out.data_ptr()));
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("jacobian_norms", TORCH_BOX(&jacobian_norms)); }
}  // namespace torch_curvature::cpu
