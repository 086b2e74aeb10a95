// Registers jacobian_gram for CUDA.
#include "gram_by_jacobian.cuh"
#include "jacobian_operands.h"

namespace torch_curvature::cuda {
namespace {

void gram_into(const Tensor& g, const Tensor& a, const std::optional<Tensor>& g2, const std::optional<Tensor>& a2,
               const GramSizes& s, bool add, Tensor& out) {
  if (product(s.result) == 0) return;
  const OnDevice here(g);
  const JacobianOperands left(g, a, s.left), right(g2 ? *g2 : g, a2 ? *a2 : a, s.right);
  dispatch_products(g.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const GramPlan<T> plan = gram_plan(left.jacobian<T>(), right.jacobian<T>(), !g2);
    const Workspace<accumulate_t<T>> workspace(g, jacobian_gram_workspace(plan));
    launch_jacobian_gram(plan, static_cast<T*>(out.data_ptr()), add, workspace.data(), here.stream());
  });
}

Tensor jacobian_gram(const Tensor& g, const Tensor& a, std::optional<Tensor> g2, std::optional<Tensor> a2) {
  const GramSizes s = check_jacobian_gram(g, a, g2, a2);
  Tensor out = new_result("jacobian_gram", g, s.result);
  gram_into(g, a, g2, a2, s, false, out);
  return out;
}

void jacobian_gram_add(const Tensor& g, const Tensor& a, std::optional<Tensor> g2, std::optional<Tensor> a2,
                       Tensor out) {
  const GramSizes s = check_jacobian_gram(g, a, g2, a2);
  check_out("jacobian_gram", out, g, s.result);
  gram_into(g, a, g2, a2, s, true, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) {
  m.impl("jacobian_gram", TORCH_BOX(&jacobian_gram));
  m.impl("jacobian_gram_add", TORCH_BOX(&jacobian_gram_add));
}
}  // namespace torch_curvature::cuda
