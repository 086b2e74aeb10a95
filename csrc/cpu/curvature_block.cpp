// curvature_block: a block between the parameters of two layers, added to or written into its places of a symmetric
// matrix.
//
//   value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j]
//   out[row(o, i), column(p, j)] (+)= value,   out[column(p, j), row(o, i)] (+)= value
//
// Shapes: m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2] (zero for inputs i >= D) or only
// its diagonal [N, O2], out [P, P]. Second derivatives of a loss by the weights of z = W a, given those by the z: m by
// both, d = da / dz2, g by z alone.
//
// How: two_layers.h. Without a2 it is the block of one layer with itself: only the pairs o <= p and i <= j are
// multiplied (kronecker_core.h).
#include "kronecker_core.h"
#include "two_layers.h"

namespace torch_curvature::cpu {
namespace {

// A layer with itself that has one input, a bias: sums over the samples, m[n, o, p] a[n]^2 for p >= o.
template <class T, class A>
CURVATURE_CLONES void sum_samples(const T* m, int64_t mn, int64_t mp, const T* a, int64_t an, int64_t N, int64_t count,
                                  A* __restrict__ sum) {
  std::fill_n(sum, count, A(0));
  for (int64_t n = 0; n < N; ++n) {
    const A weight = static_cast<A>(a[n * an]) * static_cast<A>(a[n * an]);
    const T* row = m + n * mn;
    if (mp == 1)
      for (int64_t p = 0; p < count; ++p) sum[p] += weight * static_cast<A>(row[p]);
    else
      for (int64_t p = 0; p < count; ++p) sum[p] += weight * static_cast<A>(row[p * mp]);
  }
}

template <class T>
void one_input(const TwoLayers<T>& s) {
  using A = accumulate_t<T>;
  const BlockSizes& z = s.size;
  share_tasks(z.O, double(z.N) * z.O * z.O > kWorthThreads, [&](int64_t o) {
    Buffer<A> sum(z.O - o);
    sum_samples<T, A>(s.m + o * (s.mo + s.mp), s.mn, s.mp, s.a, s.an, z.N, z.O - o, sum);
    for (int64_t p = o; p < z.O; ++p) {
      const int64_t row = z.rows.at(o, 0, 1), column = z.rows.at(p, 0, 1);
      T &to = s.out[row * s.ld + column], &twin = s.out[column * s.ld + row];
      to = twin = static_cast<T>(s.add ? A(to) + sum[p - o] : sum[p - o]);
    }
  });
}

// No samples: zeros, or nothing to add.
void write_zeros(const BlockSizes& z, bool symmetric, Tensor& out) {
  const int64_t ld = out.stride(0);
  dispatch_floating(out.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(out.data_ptr());
    for (int64_t o = 0; o < z.O; ++o)
      for (int64_t i = 0; i < z.I; ++i)
        for (int64_t p = 0; p < z.O2; ++p)
          for (int64_t j = 0; j < z.I2; ++j) {
            const int64_t row = z.rows.at(o, i, z.I), column = (symmetric ? z.rows : z.columns).at(p, j, z.I2);
            to[row * ld + column] = to[column * ld + row] = T(0);
          }
  });
}

void curvature_block(const Tensor& m, const Tensor& a, std::optional<Tensor> a2, std::optional<Tensor> g,
                     std::optional<Tensor> d, std::vector<int64_t> rows, std::vector<int64_t> columns, bool add,
                     Tensor out) {
  const BlockSizes z = check_curvature_block(m, a, a2, g, d, rows, columns, out);
  if (z.O * z.I * z.O2 * z.I2 == 0) return;
  if (z.N == 0) {
    if (!add) write_zeros(z, !a2, out);
    return;
  }
  const auto sm = strided<3>(m, {}), sd = strided<3>(d && z.D && !z.diagonal ? *d : m, {});
  const auto diagonal = strided<2>(d && z.diagonal ? *d : a, {});
  const auto sa = strided<2>(a, {}), sa2 = strided<2>(a2 ? *a2 : a, {}), sg = strided<2>(g ? *g : a, {});
  dispatch_floating(m.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const T* values = sm.template data<T>();
    T* to = static_cast<T*>(out.data_ptr());
    const bool moves = g && z.D;
    if (a2 || z.I == 1) {
      (a2 ? two_layers<T> : one_input<T>)({values,
                                           sa.template data<T>(),
                                           sa2.template data<T>(),
                                           moves ? sg.template data<T>() : nullptr,
                                           !moves       ? nullptr
                                           : z.diagonal ? diagonal.template data<T>()
                                                        : sd.template data<T>(),
                                           sm.core[0],
                                           sm.core[1],
                                           sm.core[2],
                                           sa.core[0],
                                           sa.core[1],
                                           sa2.core[0],
                                           sa2.core[1],
                                           sg.core[0],
                                           sg.core[1],
                                           z.diagonal ? diagonal.core[0] : sd.core[0],
                                           z.diagonal ? 0 : sd.core[1],
                                           z.diagonal ? diagonal.core[1] : sd.core[2],
                                           z,
                                           to,
                                           out.stride(0),
                                           add});
      return;
    }
    const T* own = sa.template data<T>();
    const KroneckerProblem<T> problem{own,  own, sa.core[0], sa.core[1], sa.core[0],    sa.core[1],
                                      z.N,  z.O, z.O2,       z.I,        z.I2,          true,
                                      true, to,  z.rows,     z.rows,     out.stride(0), add};
    kronecker<T>(problem, [&](const Pair* pairs, int64_t count, A* to) {
      copy_pairs<T, A>(values, sm.core[0], sm.core[1], sm.core[2], pairs, count, z.N, to);
    });
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("curvature_block", TORCH_BOX(&curvature_block)); }
}  // namespace torch_curvature::cpu
