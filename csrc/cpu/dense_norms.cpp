// dense_norms: out[v, n] = sum over layers l of |g_l[v, n]|^2 (|a_l[n]|^2 + b_l), squared norms of the gradients of
// dense layers with one position a sample, all layers in one pass.
//
// A helper of the CPU: layer by layer an operator and its bookkeeping take longer than a small layer. Declared here.
//
// Shapes: g_l [V, N, O_l], a_l [N, I_l], b_l 1 where a bias goes with the weight, else 0; a_l with I_l = 0 leaves only
// b_l. Entries are contiguous. A thread takes a run of samples; 2 (V O + I) flops and bytes of g and a once.
#include "dense_layers.h"

namespace torch_curvature::cpu {
namespace {

template <class T>
void norms(const std::vector<Tensor>& g, const std::vector<Tensor>& a, const std::vector<int64_t>& bias, int64_t V,
           int64_t N, T* out) {
  const auto layers = dense_layers<T>("dense_norms", g, a, bias);
  int64_t cost = 1;
  for (const DenseLayer<T>& l : layers) cost += V * l.O + l.I;
  parallel_over(N, cost, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t v = 0; v < V; ++v) out[v * N + n] = 0;
      for (const DenseLayer<T>& l : layers) {
        const T input = l.bias + product<T>(l.a + n * l.an, l.a + n * l.an, l.I);
        for (int64_t v = 0; v < V; ++v) {
          const T* g = l.g + v * l.gv + n * l.gn;
          out[v * N + n] += input * product<T>(g, g, l.O);
        }
      }
    }
  });
}

Tensor dense_norms(const std::vector<Tensor>& g, const std::vector<Tensor>& a, const std::vector<int64_t>& bias) {
  const char* op = "dense_norms";
  check_dense_layers(op, g, a, bias);
  const int64_t V = g[0].size(0), N = g[0].size(1);
  Tensor out = new_result(op, g[0], {V, N});
  if (g[0].scalar_type() == ScalarType::Float) norms<float>(g, a, bias, V, N, static_cast<float*>(out.data_ptr()));
  else norms<double>(g, a, bias, V, N, static_cast<double*>(out.data_ptr()));
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_norms(Tensor[] g, Tensor[] a, int[] bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("dense_norms", TORCH_BOX(&dense_norms)); }
}  // namespace torch_curvature::cpu
