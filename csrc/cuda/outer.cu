// Registers outer for CUDA.
#include "outer.cuh"

#include "registration.h"

namespace torch_curvature::cuda {
namespace {

void outer_into(const Tensor& u, const Tensor& v, const OuterSizes& s, Tensor& out) {
  const int64_t batch = product(s.batch);
  if (batch * s.m * s.n == 0) return;
  const OnDevice here(u);
  const auto su = strided<1>(u, s.batch), sv = strided<1>(v, s.batch);
  const OuterShape shape{batch, s.m, s.n, su.batch, su.core[0], sv.batch, sv.core[0]};
  dispatch_floating(u.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_outer<T>(su.data<T>(), sv.data<T>(), static_cast<T*>(out.data_ptr()), shape, here.stream());
  });
}

Tensor outer(const Tensor& u, const Tensor& v) {
  const OuterSizes s = check_outer(u, v);
  Tensor out = new_result("outer", u, s.result);
  outer_into(u, v, s, out);
  return out;
}

void outer_out(const Tensor& u, const Tensor& v, Tensor out) {
  const OuterSizes s = check_outer(u, v);
  check_out("outer", out, u, s.result);
  outer_into(u, v, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) {
  m.impl("outer", TORCH_BOX(&outer));
  m.impl("outer_out", TORCH_BOX(&outer_out));
}
}  // namespace torch_curvature::cuda
