// dense_diagonals: for each layer l out[o, i] = sum_vn sign[v, n] g_l[v, n, o]^2 a_l[n, i]^2, diagonals of Gauss-Newton
// blocks of dense layers with one position a sample, and those of their biases, sum_vn sign[v, n] g_l[v, n, o]^2.
//
// A helper of the CPU for small batches: layer by layer an operator and its bookkeeping take longer than the
// arithmetic. Declared here.
//
// Shapes: g_l [V, N, O_l], a_l [N, I_l], sign [V, N], wanted_l 1 for the weight, 2 for the bias, 3 for both, which is
// also the order of the results. A task is eight outputs of a layer, all samples: no sum depends on the threads. 2 N O
// I + 3 V N O flops, bytes of g and a once; the squares of all a are packed first.
#include "dense_layers.h"
#include "jacobian.h"

namespace torch_curvature::cpu {
namespace {
enum Wanted : int64_t { kOfWeight = 1, kOfBias = 2 };

template <class T>
struct Squares {
  const T *g, *a;
  int64_t gv, gn, go, an, ai, O, I, wanted;
  int64_t packed, first_panel, first_band;
  T *weight, *bias;
};

template <class T>
CURVATURE_CLONES void square_in_place(T* x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) x[k] *= x[k];
}

// h[n, k] = sum_v sign[v, n] g[v, n, k]^2 for `count` outputs, rows kRows apart.
template <class T>
CURVATURE_CLONES void sums_of_squares(const Squares<T>& l, const T* g, const Sign<T>& sign, int64_t V, int64_t N,
                                      int64_t count, T* __restrict__ h) {
  for (int64_t n = 0; n < N; ++n) {
    T sum[kRows] = {};
    for (int64_t v = 0; v < V; ++v) {
      const T* x = g + v * l.gv + n * l.gn;
      if (count == kRows && l.go == 1 && !sign.data) {
        for (int64_t k = 0; k < kRows; ++k) sum[k] += x[k] * x[k];
        continue;
      }
      const T w = sign(v, n);
      for (int64_t k = 0; k < count; ++k) sum[k] += w * x[k * l.go] * x[k * l.go];
    }
    for (int64_t k = 0; k < kRows; ++k) h[n * kRows + k] = sum[k];
  }
}

template <class T>
CURVATURE_CLONES void sum_rows(const T* h, int64_t N, double* total) {
  double sum[kRows] = {};
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < kRows; ++k) sum[k] += h[n * kRows + k];
  std::copy_n(sum, kRows, total);
}

template <class T>
void band(const Squares<T>& l, const T* squares, int64_t o, const Sign<T>& sign, int64_t V, int64_t N) {
  constexpr int64_t W = kCols<T>;
  const int64_t rows = std::min(kRows, l.O - o);
  Buffer<T> h(N * kRows), tile(kRows * W);
  sums_of_squares<T>(l, l.g + o * l.go, sign, V, N, rows, h);
  if (l.wanted & kOfWeight)
    for (int64_t q = 0; q < panels<T>(l.I); ++q) {
      tile_product<T>()(h, kRows, squares + l.packed + q * N * W, W, {N}, tile, rows, panel_width<T>(l.I, q), false);
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(tile + r * W, panel_width<T>(l.I, q), l.weight + (o + r) * l.I + q * W);
    }
  if (!(l.wanted & kOfBias)) return;
  double total[kRows] = {};
  sum_rows<T>(h, N, total);
  for (int64_t r = 0; r < rows; ++r) l.bias[o + r] = static_cast<T>(total[r]);
}

template <class T>
void diagonals(const std::vector<Tensor>& g, const std::vector<Tensor>& a, const std::vector<int64_t>& wanted,
               const Sign<T>& sign, int64_t V, int64_t N, std::vector<Tensor>& found) {
  constexpr int64_t W = kCols<T>;
  std::vector<Squares<T>> layers;
  int64_t packed = 0, all_panels = 0, bands = 0;
  double work = 0;
  for (size_t k = 0; k < g.size(); ++k) {
    Squares<T> l{static_cast<const T*>(g[k].data_ptr()),
                 static_cast<const T*>(a[k].data_ptr()),
                 g[k].stride(0),
                 g[k].stride(1),
                 g[k].stride(2),
                 a[k].stride(0),
                 a[k].stride(1),
                 g[k].size(2),
                 a[k].size(1),
                 wanted[k],
                 packed,
                 all_panels,
                 bands,
                 nullptr,
                 nullptr};
    if (l.wanted & kOfWeight) {
      found.push_back(new_result("dense_diagonals", g[k], {l.O, l.I}));
      l.weight = static_cast<T*>(found.back().data_ptr());
      packed += panels<T>(l.I) * N * W, all_panels += panels<T>(l.I);
    }
    if (l.wanted & kOfBias) {
      found.push_back(new_result("dense_diagonals", g[k], {l.O}));
      l.bias = static_cast<T*>(found.back().data_ptr());
    }
    bands += divide_up(l.O, kRows);
    work += static_cast<double>(N) * l.O * (l.I + V);
    layers.push_back(l);
  }
  Buffer<T> squares(packed);
  const bool threads = work > kWorthThreads;
  share_tasks(all_panels, threads, [&](int64_t task) {
    size_t k = layers.size() - 1;
    while (layers[k].first_panel > task || !(layers[k].wanted & kOfWeight)) --k;
    const Squares<T>& l = layers[k];
    const int64_t q = task - l.first_panel;
    T* panel = squares + l.packed + q * N * W;
    pack_panel<T, T>(l.a + q * W * l.ai, N, l.an, l.ai, panel_width<T>(l.I, q), panel);
    square_in_place<T>(panel, N * W);
  });
  share_tasks(bands, threads, [&](int64_t task) {
    size_t k = layers.size() - 1;
    while (layers[k].first_band > task) --k;
    band<T>(layers[k], squares, (task - layers[k].first_band) * kRows, sign, V, N);
  });
}

std::vector<Tensor> dense_diagonals(const std::vector<Tensor>& g, const std::vector<Tensor>& a,
                                    const std::vector<int64_t>& wanted, std::optional<Tensor> sign) {
  const char* op = "dense_diagonals";
  check_dense_layers(op, g, a, wanted);
  const int64_t V = g[0].size(0), N = g[0].size(1);
  const ScalarType dtype = g[0].scalar_type();
  for (size_t l = 0; l < g.size(); ++l) {
    CURVATURE_CHECK(g[l].size(2) > 0, op, ": layer ", l, " has g ", shape_text(g[l]), ", no outputs.");
    CURVATURE_CHECK(1 <= wanted[l] && wanted[l] <= 3, op, ": nothing is wanted of layer ", l, ".");
  }
  if (sign)
    CURVATURE_CHECK(sign->dim() == 2 && sign->size(0) == V && sign->size(1) == N && sign->scalar_type() == dtype, op,
                    ": 'sign' must be [", V, ", ", N, "] of the dtype of g, got ", shape_text(*sign), ".");
  std::vector<Tensor> found;
  if (dtype == ScalarType::Float) diagonals<float>(g, a, wanted, Sign<float>(sign), V, N, found);
  else diagonals<double>(g, a, wanted, Sign<double>(sign), V, N, found);
  return found;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("dense_diagonals(Tensor[] g, Tensor[] a, int[] wanted, Tensor? sign) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("dense_diagonals", TORCH_BOX(&dense_diagonals)); }
}  // namespace torch_curvature::cpu
