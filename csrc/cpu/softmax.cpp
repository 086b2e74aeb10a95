// What softmax cross entropy needs of small batches, in one pass each: in torch it is forty operators on tiny tensors.
//
// These are helpers of the losses for the CPU, declared here: elsewhere, and where something is differentiated, the
// losses write the same in operators of torch.
//
// softmax_targets: u [N, D, K] logits, y [N, D] classes -> p [N, D, K] softmax(u), valid [N, D] 1 where y is not
// `ignored` and 0 where it is, found [3] in float64: the number of valid rows, of valid rows whose y is no class, of
// values of p that are NaN. 3 N D K flops and N D K exponentials; bytes of u and p once.
//
// subtract_targets_: g [N, D, K] -= valid [N, D] at the classes y [N, D] of rows whose valid is not zero.
//
// softmax_columns: p [S, N, K], mass [S, N] -> out [S, high - low, N, K], columns low <= k < high of a square root of
// |mass| (diag p - p p^T). With the tails r_k = p_k + ... + p_K (nothing beyond K), column k is, times sqrt |mass|,
//   sqrt(p_k r_{k+1} / r_k) at k,   -p_j sqrt(p_k / (r_k r_{k+1})) at j > k,   0 at j < k,
// 0 / 0 and x / 0 being zero: nothing is left of a tail that has vanished. One thread takes whole rows (s, n); bytes of
// out once.
//
// softmax_product: p [N, D, K], mass [N, D], u [V, N, D, K] -> out [V, N, D, K], mass (diag p - p p^T) u. 4 V N D K
// flops; bytes of u and out once.
#include "exponential.h"
#include "kernel.h"

#include <cmath>
#include <tuple>

namespace torch_curvature::cpu {
namespace {

Tensor three_counts() {
  const int64_t size = 3, stride = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float64(),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// What the exponentials are taken of, and then their share of the sum.
template <class T>
void below_largest(const T* u, int64_t stride, int64_t K, T* p) {
  T largest = u[0];
  for (int64_t k = 1; k < K; ++k) largest = std::max(largest, u[k * stride]);
  for (int64_t k = 0; k < K; ++k) p[k] = u[k * stride] - largest;
}
template <class T>
void scale_to_one(T* p, int64_t K) {
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += p[k];
  const T scale = static_cast<T>(1 / sum);
  for (int64_t k = 0; k < K; ++k) p[k] *= scale;
}

std::tuple<Tensor, Tensor, Tensor> softmax_targets(const Tensor& u, const Tensor& y, int64_t ignored) {
  CURVATURE_CHECK(u.dim() == 3 && y.dim() == 2 && y.size(0) == u.size(0) && y.size(1) == u.size(1) && u.size(2) > 0 &&
                      y.scalar_type() == ScalarType::Long,
                  "softmax_targets: u [N, D, K] and y [N, D] of int64 are needed.");
  const int64_t N = u.size(0), D = u.size(1), K = u.size(2);
  Tensor p = new_result("softmax_targets", u, {N, D, K}), valid = new_result("softmax_targets", u, {N, D});
  Tensor found = three_counts();
  int64_t counted = 0, outside = 0, nan = 0;
  dispatch_floating(u.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const T* x = static_cast<const T*>(u.data_ptr());
      const int64_t* target = static_cast<const int64_t*>(y.data_ptr());
      T *to = static_cast<T*>(p.data_ptr()), *flag = static_cast<T*>(valid.data_ptr());
      for (int64_t r = 0; r < N * D; ++r)
        below_largest<T>(x + r / D * u.stride(0) + r % D * u.stride(1), u.stride(2), K, to + r * K);
      exponentials<T>(to, N * D * K);
      for (int64_t r = 0; r < N * D; ++r) {
        const int64_t n = r / D, d = r % D, c = target[n * y.stride(0) + d * y.stride(1)];
        scale_to_one<T>(to + r * K, K);
        flag[r] = c != ignored;
        counted += c != ignored;
        outside += c != ignored && (c < 0 || c >= K);
        for (int64_t k = 0; k < K; ++k) nan += to[r * K + k] != to[r * K + k];
      }
    } else {
      CURVATURE_CHECK(false, "softmax_targets: float32 or float64 is needed.");
    }
  });
  double* counts = static_cast<double*>(found.data_ptr());
  counts[0] = static_cast<double>(counted), counts[1] = static_cast<double>(outside);
  counts[2] = static_cast<double>(nan);
  return {p, valid, found};
}

void subtract_targets_(const Tensor& g, const Tensor& y, const Tensor& valid) {
  bool fits = g.dim() == 3 && y.dim() == 2 && valid.dim() == 2 && y.scalar_type() == ScalarType::Long &&
              valid.scalar_type() == g.scalar_type();
  for (int64_t k = 0; fits && k < 2; ++k) fits = y.size(k) == g.size(k) && valid.size(k) == g.size(k);
  CURVATURE_CHECK(fits, "subtract_targets_: g [N, D, K], y [N, D] of int64 and valid [N, D] of one dtype are needed.");
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(g.data_ptr());
    const T* weight = static_cast<const T*>(valid.data_ptr());
    const int64_t* target = static_cast<const int64_t*>(y.data_ptr());
    for (int64_t n = 0; n < g.size(0); ++n)
      for (int64_t d = 0; d < g.size(1); ++d) {
        const T w = weight[n * valid.stride(0) + d * valid.stride(1)];
        if (w == T(0)) continue;
        const int64_t c = target[n * y.stride(0) + d * y.stride(1)];
        CURVATURE_CHECK(0 <= c && c < g.size(2), "subtract_targets_: y holds ", c, ", which is none of the ", g.size(2),
                        " classes.");
        T& place = to[n * g.stride(0) + d * g.stride(1) + c * g.stride(2)];
        place = place - w;
      }
  });
}

// Columns low to high of one row, `step` apart; `tail` has room for K + 1.
template <class T>
CURVATURE_CLONES void columns_of_row(const T* p, int64_t stride, T mass, int64_t K, int64_t low, int64_t high, T* tail,
                                     T* __restrict__ out, int64_t step) {
  double sum = 0;
  tail[K] = 0;
  for (int64_t k = K; k-- > 0;) tail[k] = static_cast<T>(sum += p[k * stride]);
  const T scale = std::sqrt(std::abs(mass));
  for (int64_t k = low; k < high; ++k, out += step) {
    const T here = tail[k], after = std::sqrt(tail[k + 1]);
    const T part = here != 0 ? std::sqrt(p[k * stride] / here) * scale : T(0);
    const T below = after != 0 ? -part / after : T(0);
    for (int64_t j = 0; j < k; ++j) out[j] = 0;
    out[k] = part * after;
    for (int64_t j = k + 1; j < K; ++j) out[j] = p[j * stride] * below;
  }
}

Tensor softmax_columns(const Tensor& p, const Tensor& mass, int64_t low, int64_t high) {
  CURVATURE_CHECK(p.dim() == 3 && mass.dim() == 2 && mass.size(0) == p.size(0) && mass.size(1) == p.size(1) &&
                      mass.scalar_type() == p.scalar_type() && 0 <= low && low <= high && high <= p.size(2),
                  "softmax_columns: p [S, N, K] and mass [S, N] of one dtype and 0 <= low <= high <= K are needed.");
  const int64_t S = p.size(0), N = p.size(1), K = p.size(2), V = high - low;
  Tensor out = new_result("softmax_columns", p, {S, V, N, K});
  dispatch_floating(p.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const T *x = static_cast<const T*>(p.data_ptr()), *weight = static_cast<const T*>(mass.data_ptr());
      T* to = static_cast<T*>(out.data_ptr());
      parallel_over(S * N, (V + 1) * K, [&](int64_t begin, int64_t end) {
        Buffer<T> tail(K + 1);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t s = r / N, n = r % N;
          columns_of_row<T>(x + s * p.stride(0) + n * p.stride(1), p.stride(2),
                            weight[s * mass.stride(0) + n * mass.stride(1)], K, low, high, tail,
                            to + (s * V * N + n) * K, N * K);
        }
      });
    } else {
      CURVATURE_CHECK(false, "softmax_columns: float32 or float64 is needed.");
    }
  });
  return out;
}

template <class T>
CURVATURE_CLONES void product_of_row(const T* p, const T* u, T mass, int64_t K, T* __restrict__ out) {
  double mean = 0;
  for (int64_t k = 0; k < K; ++k) mean += p[k] * u[k];
  for (int64_t k = 0; k < K; ++k) out[k] = mass * p[k] * (u[k] - static_cast<T>(mean));
}

Tensor softmax_product(const Tensor& p, const Tensor& mass, const Tensor& u) {
  const bool fits = p.dim() == 3 && mass.dim() == 2 && u.dim() == 4 && mass.size(0) == p.size(0) &&
                    mass.size(1) == p.size(1) && u.size(1) == p.size(0) && u.size(2) == p.size(1) &&
                    u.size(3) == p.size(2) && mass.scalar_type() == p.scalar_type() &&
                    u.scalar_type() == p.scalar_type();
  CURVATURE_CHECK(fits, "softmax_product: p [N, D, K], mass [N, D] and u [V, N, D, K] of one dtype are needed.");
  const int64_t V = u.size(0), N = p.size(0), D = p.size(1), K = p.size(2);
  Tensor out = new_result("softmax_product", p, {V, N, D, K});
  const Tensor x = torch::stable::contiguous(u), q = torch::stable::contiguous(p);
  dispatch_floating(p.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
      const T *given = static_cast<const T*>(x.data_ptr()), *of = static_cast<const T*>(q.data_ptr());
      const T* weight = static_cast<const T*>(mass.data_ptr());
      T* to = static_cast<T*>(out.data_ptr());
      parallel_over(V * N * D, K, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t row = r % (N * D);
          product_of_row<T>(of + row * K, given + r * K, weight[row / D * mass.stride(0) + row % D * mass.stride(1)], K,
                            to + r * K);
        }
      });
    } else {
      CURVATURE_CHECK(false, "softmax_product: float32 or float64 is needed.");
    }
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) {
  m.def("softmax_targets(Tensor u, Tensor y, int ignored) -> (Tensor, Tensor, Tensor)");
  m.def("subtract_targets_(Tensor(a!) g, Tensor y, Tensor valid) -> ()");
  m.def("softmax_columns(Tensor p, Tensor mass, int low, int high) -> Tensor");
  m.def("softmax_product(Tensor p, Tensor mass, Tensor u) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("softmax_targets", TORCH_BOX(&softmax_targets));
  m.impl("subtract_targets_", TORCH_BOX(&subtract_targets_));
  m.impl("softmax_columns", TORCH_BOX(&softmax_columns));
  m.impl("softmax_product", TORCH_BOX(&softmax_product));
}
}  // namespace torch_curvature::cpu
