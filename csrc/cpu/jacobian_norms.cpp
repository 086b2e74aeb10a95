// jacobian_norms: out[v, n] = sum_oi J[v, n, o, i]^2, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
//
// Shapes: g [V, N, S, O], a [N, S, I], out [V, N]. norms_with_bias, a helper of the CPU declared here, adds
// |sum_s g[v, n, s]|^2, what a last entry of ones in a would add. The cheapest by counted multiply-adds of
//   S = 1: |g|^2 |a|^2                                                                      V N O + N I
//   pairs: sum_st (g_s . g_t)(a_s . a_t), each s <= t once, straight from the rows          N (V O + I) S (S + 1) / 2
//   sum:   panels of J[v, n] or of its transpose, squared and summed while in cache         V N S O I
// Nothing of size S x S is stored; of J a panel of columns, or all of it where that is no more than 64 KiB. Bytes
// moved: those of g and a, once; those of the next sample are asked for while this one's are multiplied.
#include "jacobian.h"
#include "overlaps.h"
#include "panel_product.h"

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

template <class A>
A total(const A* lanes) {
  A sum = 0;
  for (int64_t c = 0; c < kCols<A>; ++c) sum += lanes[c];
  return sum;
}

// |sum_s g_s|^2 for rows g_s [O] that are `step` apart.
template <class T, class A>
CURVATURE_CLONES A square_of_sum(const T* g, int64_t S, int64_t step, int64_t O, int64_t stride, A* __restrict__ sums) {
  if (stride == 1) {
    std::fill_n(sums, O, A(0));
    for (int64_t s = 0; s < S; ++s)
      for (int64_t o = 0; o < O; ++o) sums[o] += static_cast<A>(g[s * step + o]);
  } else {
    for (int64_t o = 0; o < O; ++o) {
      constexpr int64_t kLanes = 16;
      A lanes[kLanes] = {};
      int64_t s = 0;
      if (step == 1)
        for (; s + kLanes <= S; s += kLanes)
          for (int64_t c = 0; c < kLanes; ++c) lanes[c] += static_cast<A>(g[o * stride + s + c]);
      for (; s < S; ++s) lanes[0] += static_cast<A>(g[o * stride + s * step]);
      sums[o] = 0;
      for (const A x : lanes) sums[o] += x;
    }
  }
  return sum_of_squares<A, A>(sums, O, 1);
}

template <class T>
void one_position(const Jacobian<T>& J, accumulate_t<T> one, T* out) {
  using A = accumulate_t<T>;
  const JacobianSizes& s = J.size;
  parallel_over(s.N, s.V * s.O + s.I, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const A of_a = sum_of_squares<T, A>(J.a_at(n), s.I, J.ai) + one;
      for (int64_t v = 0; v < s.V; ++v)
        out[v * s.N + n] = static_cast<T>(sum_of_squares<T, A>(J.g_at(v, n), s.O, J.go) * of_a);
    }
  });
}

// Rows of whole vectors: a copy of x [rows, depth] that ends in zeros, made tile by tile for the sake of transposes.
template <class T, class A>
CURVATURE_CLONES void copy_rows(const T* x, int64_t row, int64_t stride, int64_t rows, int64_t depth, int64_t padded,
                                A* __restrict__ out) {
  constexpr int64_t kEdge = 16;
  for (int64_t s0 = 0; s0 < rows; s0 += kEdge)
    for (int64_t k0 = 0; k0 < depth; k0 += kEdge)
      for (int64_t s = s0; s < std::min(rows, s0 + kEdge); ++s)
        for (int64_t k = k0; k < std::min(depth, k0 + kEdge); ++k)
          out[s * padded + k] = static_cast<A>(x[s * row + k * stride]);
  for (int64_t s = 0; s < rows; ++s)
    for (int64_t k = depth; k < padded; ++k) out[s * padded + k] = 0;
}

// Some columns of some samples, and the sample that comes after them (N: none).
struct Task {
  int64_t first, last, v0, v1, following;
  int64_t after(int64_t n) const { return n + 1 < last ? n + 1 : following; }
};

// What sample n holds, to be asked for in so many calls.
template <class T>
void look_ahead(const Jacobian<T>& J, int64_t n, int64_t v0, int64_t v1, int64_t calls, Ahead& ahead) {
  const JacobianSizes& s = J.size;
  ahead.clear();
  if (n >= s.N) return;
  if ((J.ai == 1 && J.as == s.I) || (J.as == 1 && J.ai == s.S)) ahead.add(J.a_at(n), s.S * s.I);
  if ((J.go == 1 && J.gs == s.O) || (J.gs == 1 && J.go == s.S))
    for (int64_t v = v0; v < v1; ++v) ahead.add(J.g_at(v, n), s.S * s.O);
  ahead.spread(calls);
}

// Columns of samples through the overlaps of their positions.
template <class T, class A>
void by_pairs(const Jacobian<T>& J, const Task& task, A one, T* out) {
  const JacobianSizes& s = J.size;
  const auto [first, last, v0, v1, following] = task;
  const auto kernel = overlaps<A>();
  const int64_t L = kernel.lanes, I = divide_up(s.I, L) * L, O = divide_up(s.O, L) * L, V = v1 - v0;
  const bool direct_a = std::is_same_v<T, A> && J.ai == 1 && I == s.I,
             direct_g = std::is_same_v<T, A> && J.go == 1 && O == s.O;
  const int64_t of_a = direct_a ? 0 : s.S * I, of_g = direct_g ? 0 : V * s.S * O;
  const int64_t blocks = divide_up(s.S, kernel.rows);
  Ahead ahead;
  Buffer<A> room(of_a + of_g + V * L + V);
  A *copy_a = room, *copy_g = copy_a + of_a, *lanes = copy_g + of_g, *sums = lanes + V * L;
  for (int64_t n = first; n < last; ++n) {
    Rows<A> a{copy_a, 0, I, I}, g{copy_g, s.S * O, O, O};
    if constexpr (std::is_same_v<T, A>) {
      if (direct_a) a = {J.a_at(n), 0, J.as, I};
      if (direct_g) g = {J.g_at(v0, n), J.gv, J.gs, O};
    }
    if (!direct_a) copy_rows<T, A>(J.a_at(n), J.as, J.ai, s.S, s.I, I, copy_a);
    if (!direct_g)
      for (int64_t v = 0; v < V; ++v) copy_rows<T, A>(J.g_at(v0 + v, n), J.gs, J.go, s.S, s.O, O, copy_g + v * s.S * O);
    look_ahead<T>(J, task.after(n), v0, v1, blocks * (blocks + 1) / 2, ahead);
    kernel.sum(a, g, s.S, V, one, ahead, lanes, sums);
    for (int64_t v = 0; v < V; ++v) out[(v0 + v) * s.N + n] = static_cast<T>(sums[v]);
  }
}

// Columns of samples through the panels of J, or of its transpose.
template <class T, class A>
void by_sum(const Jacobian<T>& J, const Task& task, A one, T* out) {
  const JacobianSizes& s = J.size;
  const auto [first, last, v0, v1, following] = task;
  const bool swapped = inputs_as_rows<T>(J, s.O, s.I);
  const Columns outputs{s.O, J.go, J.gs}, inputs{s.I, J.ai, J.as};
  const Columns x = swapped ? inputs : outputs, y = swapped ? outputs : inputs;
  PanelProduct<T> product(s.S, x, y);
  Buffer<A> panels(product.size() * (product.small() ? product.columns() : 1)), sums(one != 0 ? s.O : 0);
  for (int64_t n = first; n < last; ++n)
    for (int64_t v = v0; v < v1; ++v) {
      product.set(swapped ? J.a_at(n) : J.g_at(v, n), swapped ? J.g_at(v, n) : J.a_at(n));
      A lanes[kCols<A>] = {};
      if (product.small()) product.all(panels);
      for (int64_t q = 0; q < product.columns(); ++q) {
        if (!product.small()) product.panel(q, panels);
        add_squares<A>(panels + (product.small() ? q * product.size() : 0), x.count, panel_width<A>(y.count, q), lanes);
      }
      A square = total<A>(lanes);
      if (one != 0) square += square_of_sum<T, A>(J.g_at(v, n), s.S, J.gs, s.O, J.go, sums);
      out[v * s.N + n] = static_cast<T>(square);
    }
}

template <class T>
void norms(const Jacobian<T>& J, accumulate_t<T> one, T* out) {
  using A = accumulate_t<T>;
  const JacobianSizes& s = J.size;
  if (s.S == 1) return one_position<T>(J, one, out);
  // Multiply-adds of one sample, in whole tiles and blocks, with what it takes to pack, and to use a tile or a block.
  const double V = s.V, S = s.S, O = s.O, I = s.I;
  const double sum = V * divide_up(s.O, kRows) * panels<A>(s.I) * (kRows * kCols<A>)*(S + 12) + 8 * S * (V * O + I);
  const auto kernel = overlaps<A>();
  const double R = kernel.rows, L = kernel.lanes, blocks = divide_up(s.S, kernel.rows);
  // Rows that are not contiguous are copied for the pairs, entry by entry: as measured, 40 multiply-adds each.
  const double copied = 40 * S * ((J.go == 1 ? 0 : V * O) + (J.ai == 1 ? 0 : I));
  const double pairs = blocks * (blocks + 1) / 2 * R * R * (V * (O + 2 * L) + I + 6 * L) + copied;
  const double cost = std::min(pairs, sum);
  const bool worth_threads = s.N * cost > kWorthThreads;
  // A task is as many samples as make its own cost small (memory, a turn at the counter); where there are few, some
  // columns of one; never more than stay in cache.
  const int64_t each = std::clamp<int64_t>(static_cast<int64_t>(4 * kWorthThreads / cost), 1, divide_up(s.N, 8));
  const int64_t cached = std::max<int64_t>(1, (1 << 18) / (s.S * s.O));
  const int64_t step = std::min(cached, divide_up(s.V, s.N >= 8 ? 1 : 8 / s.N)), steps = divide_up(s.V, step);
  const int64_t tasks = divide_up(s.N, each);
  share_tasks_ahead(tasks * steps, worth_threads, [&](const auto& each_task) {
    each_task([&](int64_t task, int64_t following) {
      const int64_t first = task / steps * each, v0 = task % steps * step;
      const Task some{first, std::min(s.N, first + each), v0, std::min(s.V, v0 + step), following / steps * each};
      pairs < sum ? by_pairs<T, A>(J, some, one, out) : by_sum<T, A>(J, some, one, out);
    });
  });
}

Tensor norms_of(const Tensor& g, const Tensor& a, bool with_bias) {
  const JacobianSizes s = check_jacobian_norms(g, a);
  Tensor out = new_result("jacobian_norms", g, {s.V, s.N});
  if (s.V * s.N == 0) return out;
  if (s.S * s.O * (s.I + with_bias) == 0) return torch::stable::zero_(out);
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    norms<T>(Jacobian<T>(g, a, s), with_bias ? 1 : 0, static_cast<T*>(out.data_ptr()));
  });
  return out;
}

Tensor jacobian_norms(const Tensor& g, const Tensor& a) { return norms_of(g, a, false); }
Tensor norms_with_bias(const Tensor& g, const Tensor& a) { return norms_of(g, a, true); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) { m.def("norms_with_bias(Tensor g, Tensor a) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("jacobian_norms", TORCH_BOX(&jacobian_norms));
  m.impl("norms_with_bias", TORCH_BOX(&norms_with_bias));
}
}  // namespace torch_curvature::cpu
