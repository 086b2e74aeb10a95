// normalised_sums: out[v, n, f] = sum_s g[v, n, s, f] x_hat[n, s, f], the gradients of single samples by the weight of
// a layer or root-mean-square normalisation of rows.
//
// A helper of the CPU: three passes of operators over memory in one. Declared here.
//
//   x_hat = (x - mean) / sqrt(mean (x - mean)^2 + eps) along f, the mean left out where rows are not `centred`
//
// Shapes: g [V, N S, F], input x [N S, F], the rows of a sample one after the other; out [V, N, F]. Entries are
// contiguous. A thread takes samples; (2 V + 6) N S F flops; bytes of g and x once (x again from the first cache).
#include "kernel.h"
#include "rows.h"

#include <cmath>

namespace torch_curvature::cpu {
namespace {

template <class T>
CURVATURE_CLONES T lane_sum(const T* x, int64_t count, T shift, bool squares) {
  constexpr int64_t L = 64 / sizeof(T);
  T lanes[L] = {}, sum = 0;
  int64_t k = 0;
  if (squares)
    for (; k + L <= count; k += L)
      for (int64_t l = 0; l < L; ++l) lanes[l] += (x[k + l] - shift) * (x[k + l] - shift);
  else
    for (; k + L <= count; k += L)
      for (int64_t l = 0; l < L; ++l) lanes[l] += x[k + l];
  for (; k < count; ++k) sum += squares ? (x[k] - shift) * (x[k] - shift) : x[k];
  for (int64_t l = 0; l < L; ++l) sum += lanes[l];
  return sum;
}

template <class T>
CURVATURE_CLONES void add_products(const T* __restrict__ g, const T* __restrict__ x, int64_t F, T* __restrict__ sum) {
  for (int64_t f = 0; f < F; ++f) sum[f] += g[f] * x[f];
}

template <class T>
void sums(const Tensor& g, const Tensor& input, int64_t samples, double eps, bool centred, T* out) {
  const int64_t V = g.size(0), F = g.size(2), S = g.size(1) / samples, gv = g.stride(0), gr = g.stride(1);
  const int64_t xr = input.stride(0);
  const T *derivatives = static_cast<const T*>(g.data_ptr()), *x = static_cast<const T*>(input.data_ptr());
  parallel_over(samples, S * F * (V + 3), [&](int64_t begin, int64_t end) {
    Buffer<T> row(F);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t v = 0; v < V; ++v) std::fill_n(out + (v * samples + n) * F, F, T(0));
      for (int64_t r = n * S; r < (n + 1) * S; ++r) {
        const T* values = x + r * xr;
        const T mean = centred ? lane_sum<T>(values, F, T(0), false) / T(F) : T(0);
        const T scale = 1 / std::sqrt(lane_sum<T>(values, F, mean, true) / T(F) + static_cast<T>(eps));
        normalise<T>(values, mean, scale, F, row);
        for (int64_t v = 0; v < V; ++v)
          add_products<T>(derivatives + v * gv + r * gr, row, F, out + (v * samples + n) * F);
      }
    }
  });
}

Tensor normalised_sums(const Tensor& g, const Tensor& input, int64_t samples, double eps, bool centred) {
  const char* op = "normalised_sums";
  CURVATURE_CHECK(g.dim() == 3 && input.dim() == 2 && g.size(1) == input.size(0) && g.size(2) == input.size(1), op,
                  ": 'g' must be [V, R, F] and 'input' [R, F], got ", shape_text(g), " and ", shape_text(input), ".");
  CURVATURE_CHECK(samples > 0 && g.size(1) % samples == 0, op, ": ", g.size(1), " rows are not those of ", samples,
                  " samples.");
  CURVATURE_CHECK(g.scalar_type() == input.scalar_type() &&
                      (g.scalar_type() == ScalarType::Float || g.scalar_type() == ScalarType::Double),
                  op, ": both must be float32, or float64.");
  CURVATURE_CHECK(g.size(2) < 2 || (g.stride(2) == 1 && input.stride(1) == 1), op, ": entries are not contiguous.");
  Tensor out = new_result(op, g, {g.size(0), samples, g.size(2)});
  if (g.scalar_type() == ScalarType::Float)
    sums<float>(g, input, samples, eps, centred, static_cast<float*>(out.data_ptr()));
  else sums<double>(g, input, samples, eps, centred, static_cast<double*>(out.data_ptr()));
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("normalised_sums(Tensor g, Tensor input, int samples, float eps, bool centred) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("normalised_sums", TORCH_BOX(&normalised_sums)); }
}  // namespace torch_curvature::cpu
