// Registers jacobian_norms for CUDA.
#include "jacobian_norms.cuh"

#include "jacobian_operands.h"

namespace torch_curvature::cuda {
namespace {

Tensor jacobian_norms(const Tensor& g, const Tensor& a) {
  const JacobianSizes s = check_jacobian_norms(g, a);
  Tensor out = new_result("jacobian_norms", g, {s.V, s.N});
  if (s.V * s.N == 0) return out;
  const OnDevice here(g);
  const JacobianOperands operands(g, a, s);
  dispatch_products(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Jacobian<T> j = operands.jacobian<T>();
    const Workspace<accumulate_t<T>> partial(g, jacobian_norms_workspace(j));
    launch_jacobian_norms(j, static_cast<T*>(out.data_ptr()), partial.data(), here.stream());
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) { m.impl("jacobian_norms", TORCH_BOX(&jacobian_norms)); }
}  // namespace torch_curvature::cuda
