// Derivatives of images through a ReLU whose result has another memory format, in place.
//
// A helper of the CPU; declared here.
//
//   keep_positive_: G[v, n, c, y, x] = 0 where result[n, c, y, x] <= 0
//
// Shapes: G [V, N, C, H, W] channels last within an image, result [N, C, H, W] contiguous within one. A few positions
// of the result are transposed in the first cache and meet all columns there: no copy of the result in the other
// format. Bytes: G read and written once, result read once.
#include "kernel.h"
#include "tile_product.h"

namespace torch_curvature::cpu {
namespace {

template <class T>
CURVATURE_CLONES void keep_where_positive(const T* __restrict__ result, int64_t count, T* __restrict__ g) {
  for (int64_t k = 0; k < count; ++k) g[k] = result[k] <= 0 ? T(0) : g[k];
}

template <class T>
CURVATURE_CLONES void turn(const T* result, int64_t plane, int64_t channels, int64_t positions, T* __restrict__ out) {
  transpose_all<T, T>(result, plane, channels, positions, out, channels);
}

// A task is some positions of one sample.
template <class T>
void keep_positive(T* g, const T* result, int64_t V, int64_t gv, int64_t N, int64_t gn, int64_t rn, int64_t C,
                   int64_t plane) {
  constexpr int64_t kScratch = 16384 / sizeof(T);
  const int64_t each = std::min(plane, std::max<int64_t>(16, kScratch / C / 16 * 16)), blocks = divide_up(plane, each);
  share_tasks_ahead(N * blocks, double(V) * N * C * plane > kWorthThreads, [&](const auto& each_task) {
    Buffer<T> turned(each * C);
    each_task([&](int64_t task, int64_t) {
      const int64_t n = task / blocks, first = task % blocks * each, count = std::min(each, plane - first);
      turn<T>(result + n * rn + first, plane, C, count, turned);
      for (int64_t v = 0; v < V; ++v) keep_where_positive<T>(turned, count * C, g + v * gv + n * gn + first * C);
    });
  });
}

bool steps(const Tensor& x, int64_t axis, int64_t by) { return x.size(axis) == 1 || x.stride(axis) == by; }
bool is_channels_last(const Tensor& g) {
  const int64_t C = g.size(2), W = g.size(4);
  return steps(g, 2, 1) && steps(g, 4, C) && steps(g, 3, W * C);
}
bool is_contiguous(const Tensor& x) {
  const int64_t H = x.size(2), W = x.size(3);
  return steps(x, 3, 1) && steps(x, 2, W) && steps(x, 1, H * W);
}

void keep_positive_(const Tensor& g, const Tensor& result) {
  constexpr const char* op = "keep_positive_";
  CURVATURE_CHECK(g.dim() == 5 && result.dim() == 4, op,
                  ": 'g' must be [V, N, C, H, W] and 'result' [N, C, H, W], got ", shape_text(g), " and ",
                  shape_text(result), ".");
  for (int64_t k = 0; k < 4; ++k)
    CURVATURE_CHECK(g.size(k + 1) == result.size(k), op, ": 'g' and 'result' differ in shape: ", shape_text(g), " and ",
                    shape_text(result), ".");
  CURVATURE_CHECK(g.scalar_type() == result.scalar_type(), op, ": 'g' and 'result' differ in dtype.");
  if (g.numel() == 0) return;
  CURVATURE_CHECK(is_channels_last(g) && is_contiguous(result), op,
                  ": images of 'g' must be channels last, those of 'result' contiguous.");
  dispatch_floating(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
      keep_positive<T>(static_cast<T*>(g.data_ptr()), static_cast<const T*>(result.data_ptr()), g.size(0), g.stride(0),
                       g.size(1), g.stride(1), result.stride(0), g.size(2), g.size(3) * g.size(4));
    else CURVATURE_CHECK(false, op, ": float32 or float64 is needed.");
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_curvature, m) { m.def("keep_positive_(Tensor(a!) g, Tensor result) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("keep_positive_", TORCH_BOX(&keep_positive_)); }
}  // namespace torch_curvature::cpu
