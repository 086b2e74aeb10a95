// The tensors g [V, N, S, O] and a [N, S, I] as the kernels of Jacobians take them.
#pragma once
#include "jacobian.cuh"
#include "registration.h"

namespace torch_curvature::cuda {

// Kernels read along the last axis: a tensor whose last axis is strided is copied.
inline Tensor last_axis_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

class JacobianOperands {
 public:
  JacobianOperands(const Tensor& g, const Tensor& a, const JacobianSizes& s)
      : g_(last_axis_contiguous(g)), a_(last_axis_contiguous(a)), s_(s) {
    check_counts({s.S, s.V * s.N, s.O, s.I});
  }
  template <class T>
  Jacobian<T> jacobian() const {
    return {static_cast<const T*>(g_.data_ptr()),
            static_cast<const T*>(a_.data_ptr()),
            s_.V,
            s_.N,
            s_.S,
            s_.O,
            s_.I,
            g_.stride(0),
            g_.stride(1),
            g_.stride(2),
            a_.stride(0),
            a_.stride(1)};
  }

 private:
  Tensor g_, a_;  // keep the data alive
  JacobianSizes s_;
};

// sign [V, N] contiguous, or none.
class Signs {
 public:
  explicit Signs(const std::optional<Tensor>& sign) {
    if (sign) sign_ = torch::stable::contiguous(*sign);
  }
  template <class T>
  const T* data() const {
    return sign_ ? static_cast<const T*>(sign_->data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> sign_;
};
}  // namespace torch_curvature::cuda
