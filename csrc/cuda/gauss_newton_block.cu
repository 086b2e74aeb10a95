// Registers gauss_newton_block for CUDA.
#include "gauss_newton_block.cuh"

#include "jacobian_operands.h"

namespace torch_curvature::cuda {
namespace {

void block_into(const Tensor& g, const Tensor& a, const std::optional<Tensor>& sign, const JacobianSizes& s,
                Tensor& out) {
  const OnDevice here(g);
  const JacobianOperands operands(g, a, s);
  const Signs signs(sign);
  dispatch_products(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BlockPlan<T> plan = block_plan(operands.jacobian<T>(), signs.data<T>(), static_cast<T*>(out.data_ptr()));
    const Workspace<accumulate_t<T>> workspace(g, gauss_newton_block_workspace(plan));
    launch_gauss_newton_block(plan, workspace.data(), here.stream());
  });
}

Tensor gauss_newton_block(const Tensor& g, const Tensor& a, std::optional<Tensor> sign) {
  const JacobianSizes s = check_gauss_newton_block(g, a, sign);
  Tensor out = new_result("gauss_newton_block", g, {s.O * s.I, s.O * s.I});
  block_into(g, a, sign, s, out);
  return out;
}

void gauss_newton_block_out(const Tensor& g, const Tensor& a, std::optional<Tensor> sign, Tensor out) {
  const JacobianSizes s = check_gauss_newton_block(g, a, sign);
  check_out("gauss_newton_block", out, g, {s.O * s.I, s.O * s.I});
  block_into(g, a, sign, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) {
  m.impl("gauss_newton_block", TORCH_BOX(&gauss_newton_block));
  m.impl("gauss_newton_block_out", TORCH_BOX(&gauss_newton_block_out));
}
}  // namespace torch_curvature::cuda
