// c = a^T b for small row-major buffers: a [depth, rows], b [depth, cols], c [rows, cols].
// torch's own product (oneMKL where torch has it): near the peak of the processor, and single-threaded inside
// parallel_for.
#pragma once
#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <array>

namespace torch_curvature::cpu {

// Below this many multiply-adds a call of the library costs more than the loop.
constexpr int64_t kTinyProduct = 16384;

template <class A>
CURVATURE_CLONES void tiny_product(const A* a, const A* b, A* __restrict__ c, int64_t rows, int64_t depth,
                                   int64_t cols) {
  std::fill(c, c + rows * cols, A(0));
  for (int64_t n = 0; n < depth; ++n)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < cols; ++k) c[r * cols + k] += a[n * rows + r] * b[n * cols + k];
}

template <class A>
void matrix_product(const A* a, const A* b, A* c, int64_t rows, int64_t depth, int64_t cols) {
  if (rows * depth * cols <= kTinyProduct) return tiny_product(a, b, c, rows, depth, cols);
  using torch::stable::from_blob;
  const auto dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  auto blob = [&](const A* data, Sizes sizes, Sizes strides) {
    return from_blob(const_cast<A*>(data), sizes, strides, cpu, dtype);
  };
  const Tensor at = blob(a, {rows, depth}, {1, rows}), bt = blob(b, {depth, cols}, {cols, 1}),
               ct = blob(c, {rows, cols}, {cols, 1});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(at), torch::stable::detail::from(bt),
                                    torch::stable::detail::from(ct)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}
}  // namespace torch_curvature::cpu
