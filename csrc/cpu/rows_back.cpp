// softmax_back_ and layer_norm_back_: columns G [V, R, K] at softmaxes or normalised rows, pulled back in their place.
//
// Helpers of the CPU: what was saved of a row is read once for all columns, where torch takes one column at a time, and
// nothing fresh is written. Declared here.
//
//   softmax_back_      G <- p (G - sum_k p G)
//   layer_norm_back_   G <- d (w G - mean_k w G - x_hat mean_k x_hat w G),  x_hat = (x - mean) d
//
// Shapes: p [R, K], the softmax of each row; x [R, K], mean [R], d [R] (`scale`), w [K] or none (ones).
//
// All are contiguous. A thread takes rows; 4 or 10 V R K flops; bytes of G twice and of p or x once.
#include "kernel.h"
#include "rows.h"

namespace torch_curvature::cpu {
namespace {

template <class T>
CURVATURE_CLONES void less_mean(const T* __restrict__ p, T mean, int64_t count, T* __restrict__ g) {
  for (int64_t k = 0; k < count; ++k) g[k] = p[k] * (g[k] - mean);
}

template <class T>
CURVATURE_CLONES void multiply(const T* __restrict__ a, const T* __restrict__ b, int64_t count, T* __restrict__ to) {
  for (int64_t k = 0; k < count; ++k) to[k] = a[k] * b[k];
}

// g <- scale (w g - first - x second)
template <class T>
CURVATURE_CLONES void less_projections(const T* __restrict__ w, const T* __restrict__ x, T first, T second, T scale,
                                       int64_t count, T* __restrict__ g) {
  for (int64_t k = 0; k < count; ++k) g[k] = scale * (w[k] * g[k] - first - x[k] * second);
}

template <class T>
void softmax_rows(const T* p, int64_t V, int64_t R, int64_t K, T* G) {
  parallel_over(R, (2 * V + 1) * K, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t v = 0; v < V; ++v) {
        T* g = G + (v * R + r) * K;
        less_mean<T>(p + r * K, product<T>(p + r * K, g, K), K, g);
      }
  });
}

template <class T>
void normalised_rows(const T* x, const T* mean, const T* scale, const T* weight, int64_t V, int64_t R, int64_t K,
                     T* G) {
  parallel_over(R, (2 * V + 1) * K, [&](int64_t begin, int64_t end) {
    Buffer<T> row(K), weighted(K), ones(weight ? 0 : K);
    if (!weight) std::fill_n(static_cast<T*>(ones), K, T(1));
    const T* w = weight ? weight : static_cast<const T*>(ones);
    for (int64_t r = begin; r < end; ++r) {
      normalise<T>(x + r * K, mean[r], scale[r], K, row);
      multiply<T>(row, w, K, weighted);
      for (int64_t v = 0; v < V; ++v) {
        T* g = G + (v * R + r) * K;
        const T first = product<T>(w, g, K) / T(K), second = product<T>(weighted, g, K) / T(K);
        less_projections<T>(w, row, first, second, scale[r], K, g);
      }
    }
  });
}

template <class F>
void with_type(const char* op, const Tensor& G, F&& f) {
  dispatch_floating(G.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) f(static_cast<T*>(G.data_ptr()));
    else CURVATURE_CHECK(false, op, ": float32 or float64 is needed.");
  });
}

void check_rows(const char* op, const Tensor& G, const Tensor& x, const char* name, int64_t numbers) {
  CURVATURE_CHECK(G.dim() == 3 && x.numel() == numbers, op, ": 'G' must be [V, R, K] and '", name, "' have ", numbers,
                  " entries, got ", shape_text(G), " and ", shape_text(x), ".");
  CURVATURE_CHECK(G.scalar_type() == x.scalar_type(), op, ": 'G' and '", name, "' differ in dtype.");
  CURVATURE_CHECK(G.is_contiguous() && x.is_contiguous(), op, ": 'G' and '", name, "' must be contiguous.");
}

void softmax_back_(const Tensor& G, const Tensor& p) {
  const char* op = "softmax_back_";
  CURVATURE_CHECK(G.dim() == 3, op, ": 'G' must be [V, R, K], got ", shape_text(G), ".");
  check_rows(op, G, p, "p", G.size(1) * G.size(2));
  with_type(op, G, [&](auto* g) {
    using T = std::remove_pointer_t<decltype(g)>;
    softmax_rows<T>(static_cast<const T*>(p.data_ptr()), G.size(0), G.size(1), G.size(2), g);
  });
}

void layer_norm_back_(const Tensor& G, const Tensor& x, const Tensor& mean, const Tensor& scale,
                      const std::optional<Tensor>& weight) {
  const char* op = "layer_norm_back_";
  CURVATURE_CHECK(G.dim() == 3, op, ": 'G' must be [V, R, K], got ", shape_text(G), ".");
  check_rows(op, G, x, "x", G.size(1) * G.size(2));
  check_rows(op, G, mean, "mean", G.size(1));
  check_rows(op, G, scale, "scale", G.size(1));
  if (weight) check_rows(op, G, *weight, "weight", G.size(2));
  with_type(op, G, [&](auto* g) {
    using T = std::remove_pointer_t<decltype(g)>;
    auto data = [](const Tensor& t) { return static_cast<const T*>(t.data_ptr()); };
    normalised_rows<T>(data(x), data(mean), data(scale), weight ? data(*weight) : nullptr, G.size(0), G.size(1),
                       G.size(2), g);
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("softmax_back_(Tensor(a!) G, Tensor p) -> ()");
  m.def("layer_norm_back_(Tensor(a!) G, Tensor x, Tensor mean, Tensor scale, Tensor? weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("softmax_back_", TORCH_BOX(&softmax_back_));
  m.impl("layer_norm_back_", TORCH_BOX(&layer_norm_back_));
}
}  // namespace torch_curvature::cpu
