// An operand as kernels want it: a pointer, one stride for all leading axes together, a stride for each core axis.
#pragma once
#include "checks.h"

#include <array>

namespace torch_curvature {

template <size_t Core>
struct Strided {
  Tensor tensor;  // keeps the data alive
  int64_t batch;  // 0 where the batch is broadcast
  std::array<int64_t, Core> core;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.data_ptr());
  }
};

inline Tensor call_expand(const Tensor& t, const Sizes& sizes) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t), torch::stable::detail::from(sizes),
                                    torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// One stride that walks the leading axes of t, broadcast to `batch`, in order; nothing if there is none.
inline std::optional<int64_t> batch_stride(const Tensor& t, const Sizes& batch, int64_t core) {
  const int64_t own = t.dim() - core, n = static_cast<int64_t>(batch.size());
  std::optional<int64_t> inner;
  int64_t extent = 1;  // how many steps of `inner` the axes seen so far take
  for (int64_t i = n - 1; i >= 0; --i) {
    if (batch[i] == 1) continue;
    const int64_t at = i - (n - own);
    const int64_t stride = at < 0 || t.size(at) == 1 ? 0 : t.stride(at);
    if (!inner) inner = stride;
    else if (stride != *inner * extent) return std::nullopt;
    extent *= batch[i];
  }
  return inner.value_or(0);
}

// Reads t through its own strides where its leading axes collapse into one, through a contiguous copy where they do
// not.
template <size_t Core>
Strided<Core> strided(const Tensor& t, const Sizes& batch) {
  auto stride = batch_stride(t, batch, Core);
  Tensor source = t;
  if (!stride) {
    Sizes full = batch;
    for (size_t i = 0; i < Core; ++i) full.push_back(t.size(t.dim() - Core + i));
    source = torch::stable::contiguous(call_expand(t, full));
    stride = batch_stride(source, batch, Core);
  }
  Strided<Core> s{source, *stride, {}};
  for (size_t i = 0; i < Core; ++i) s.core[i] = source.stride(source.dim() - Core + i);
  return s;
}
}  // namespace torch_curvature
