// Registers gauss_newton_diagonal for CUDA.
#include "gauss_newton_diagonal.cuh"

#include "jacobian_operands.h"

namespace torch_curvature::cuda {
namespace {

Tensor gauss_newton_diagonal(const Tensor& g, const Tensor& a, std::optional<Tensor> sign) {
  const JacobianSizes s = check_gauss_newton_diagonal(g, a, sign);
  Tensor out = new_result("gauss_newton_diagonal", g, {s.O, s.I});
  const OnDevice here(g);
  const JacobianOperands operands(g, a, s);
  const Signs signs(sign);
  dispatch_products(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Jacobian<T> j = operands.jacobian<T>();
    const Workspace<accumulate_t<T>> partial(g, gauss_newton_diagonal_workspace(j));
    launch_gauss_newton_diagonal(j, signs.data<T>(), static_cast<T*>(out.data_ptr()), partial.data(), here.stream());
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) {
  m.impl("gauss_newton_diagonal", TORCH_BOX(&gauss_newton_diagonal));
}
}  // namespace torch_curvature::cuda
