// Registers kronecker_sum for CUDA.
#include "kronecker_sum.cuh"

#include "registration.h"

namespace torch_curvature::cuda {
namespace {

void kronecker_into(const Tensor& b, const Tensor& a, const std::optional<Tensor>& a2, bool symmetric,
                    const KroneckerSizes& s, Tensor& out) {
  check_counts({s.N, s.O, s.O2, s.I, s.I2});
  const OnDevice here(b);
  const auto sb = strided<3>(b, s.batch);
  const auto sa = strided<2>(a, s.batch), sr = strided<2>(a2 ? *a2 : a, s.batch);
  dispatch_products(b.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    KroneckerProblem<T> p{};
    p.b = sb.data<T>(), p.b_batch = sb.batch, p.b_n = sb.core[0], p.b_o = sb.core[1], p.b_p = sb.core[2];
    p.a = sa.data<T>(), p.a_batch = sa.batch, p.a_n = sa.core[0], p.a_i = sa.core[1];
    p.a2 = sr.data<T>(), p.a2_batch = sr.batch, p.a2_n = sr.core[0], p.a2_j = sr.core[1];
    p.batch = product(s.batch);
    p.scatter = {{s.O, s.O2, s.I, s.I2, symmetric, !a2}, static_cast<T*>(out.data_ptr())};
    p = kronecker_problem(p, s.N);
    const Workspace<accumulate_t<T>> partial(b, tile_product_workspace(p));
    launch_kronecker_sum(p, partial.data(), here.stream());
  });
}

Tensor kronecker_sum(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  Tensor out = new_result("kronecker_sum", b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
  return out;
}

void kronecker_sum_out(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric, Tensor out) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  check_out("kronecker_sum", out, b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) {
  m.impl("kronecker_sum", TORCH_BOX(&kronecker_sum));
  m.impl("kronecker_sum_out", TORCH_BOX(&kronecker_sum_out));
}
}  // namespace torch_curvature::cuda
