// What every CUDA kernel's registration needs: results and workspace from torch's allocator, dtype dispatch, the
// caller's device and stream. Included by .cu files only; kernels know nothing of torch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "../precision.h"
#include "../strided.h"
#include "numbers.cuh"

namespace torch_curvature::cuda {

// Makes the tensor's device current for as long as it lives, and names the stream that torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// A fresh, uninitialised result. Refused by its size before anything is allocated where the device could never hold it.
inline Tensor new_result(const char* op, const Tensor& like, const Sizes& sizes) {
  int64_t count = 1;
  for (int64_t s : sizes)
    CURVATURE_CHECK(!__builtin_mul_overflow(count, s, &count), op, ": the result ", shape_text(sizes),
                    " has more elements than 64 bits count.");
  constexpr double kGiB = 1024.0 * 1024 * 1024;
  const double bytes = static_cast<double>(count) * like.element_size();
  if (bytes >= kGiB) {
    const OnDevice here(like);
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess)
      CURVATURE_CHECK(bytes <= static_cast<double>(total), op, ": the result ", shape_text(sizes), " takes ",
                      bytes / kGiB, " GiB, but the device has ", total / kGiB,
                      " GiB of memory. Split the problem, or ask for a form that is not dense.");
  }
  return torch::stable::new_empty(like, sizes);
}

// Scratch memory of torch's caching allocator, safe under stream order and graph capture.
template <class A>
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t count)
      : tensor_(torch::stable::new_empty(like, Sizes{count}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float)) {
  }
  A* data() const { return static_cast<A*>(tensor_.data_ptr()); }

 private:
  Tensor tensor_;
};

// Kernels count along a single axis with 32 bits, and elements with 64.
inline void check_counts(std::initializer_list<int64_t> counts) {
  for (const int64_t count : counts)
    CURVATURE_CHECK(count <= INT32_MAX,
                    "CUDA kernels take at most 2^31 - 1 samples (times columns), positions, outputs or ",
                    "inputs, got ", count, ". Split the batch.");
}

// Calls f with a null pointer of the CUDA type that holds `dtype`.
template <class F>
void dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); break;
    case ScalarType::Double: f(static_cast<double*>(nullptr)); break;
    case ScalarType::Half: f(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: f(static_cast<__nv_bfloat16*>(nullptr)); break;
    default: CURVATURE_CHECK(false, "unsupported dtype");
  }
}
// The same for operators that multiply matrices: float32 as Tf32 where the user allows TF32.
template <class F>
void dispatch_products(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float && tf32_allowed()) f(static_cast<Tf32*>(nullptr));
  else dispatch_floating(dtype, f);
}
}  // namespace torch_curvature::cuda
