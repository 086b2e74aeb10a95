// What the helpers for dense layers with one position a sample take: g_l [V, N, O_l], a_l [N, I_l] and a number each.
#pragma once
#include "kernel.h"
#include "rows.h"

#include <vector>

namespace torch_curvature::cpu {

inline void check_dense_layers(const char* op, const std::vector<Tensor>& g, const std::vector<Tensor>& a,
                               const std::vector<int64_t>& numbers) {
  CURVATURE_CHECK(!g.empty() && g.size() == a.size() && g.size() == numbers.size() && g[0].dim() == 3, op,
                  ": as many g [V, N, O] as a [N, I] and numbers are needed.");
  const int64_t V = g[0].size(0), N = g[0].size(1);
  const ScalarType dtype = g[0].scalar_type();
  CURVATURE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": float32 or float64 is needed.");
  for (size_t l = 0; l < g.size(); ++l) {
    CURVATURE_CHECK(g[l].scalar_type() == dtype && a[l].scalar_type() == dtype, op, ": layer ", l,
                    " has another dtype.");
    CURVATURE_CHECK(g[l].dim() == 3 && a[l].dim() == 2 && g[l].size(0) == V && g[l].size(1) == N && a[l].size(0) == N,
                    op, ": layer ", l, " has g ", shape_text(g[l]), " and a ", shape_text(a[l]), ", not [", V, ", ", N,
                    ", O] and [", N, ", I].");
  }
}

// A layer whose entries are contiguous, with 1 where a bias goes with the weight, else 0.
template <class T>
struct DenseLayer {
  const T *g, *a;
  int64_t gv, gn, an, O, I;
  T bias;
};

template <class T>
std::vector<DenseLayer<T>> dense_layers(const char* op, const std::vector<Tensor>& g, const std::vector<Tensor>& a,
                                        const std::vector<int64_t>& bias) {
  std::vector<DenseLayer<T>> layers;
  for (size_t l = 0; l < g.size(); ++l) {
    CURVATURE_CHECK((g[l].size(2) < 2 || g[l].stride(2) == 1) && (a[l].size(1) < 2 || a[l].stride(1) == 1), op,
                    ": entries of layer ", l, " are not contiguous.");
    layers.push_back({static_cast<const T*>(g[l].data_ptr()), static_cast<const T*>(a[l].data_ptr()), g[l].stride(0),
                      g[l].stride(1), a[l].stride(0), g[l].size(2), a[l].size(1), static_cast<T>(bias[l])});
  }
  return layers;
}
}  // namespace torch_curvature::cpu
