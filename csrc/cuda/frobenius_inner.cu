// Registers frobenius_inner for CUDA.
#include "frobenius_inner.cuh"

#include "registration.h"

namespace torch_curvature::cuda {
namespace {

Tensor frobenius_inner(const Tensor& a, const Tensor& b) {
  const FrobeniusSizes s = check_frobenius_inner(a, b);
  Tensor out = new_result("frobenius_inner", a, s.batch);
  const int64_t batch = product(s.batch);
  if (batch == 0) return out;
  const OnDevice here(a);
  const auto sa = strided<2>(a, s.batch), sb = strided<2>(b, s.batch);
  dispatch_floating(a.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Workspace<accumulate_t<T>> partial(a, frobenius_workspace(batch, s.m, s.n));
    launch_frobenius_inner<T>({sa.data<T>(), sa.batch, sa.core[0], sa.core[1]},
                              {sb.data<T>(), sb.batch, sb.core[0], sb.core[1]}, static_cast<T*>(out.data_ptr()), batch,
                              s.m, s.n, partial.data(), here.stream());
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) { m.impl("frobenius_inner", TORCH_BOX(&frobenius_inner)); }
}  // namespace torch_curvature::cuda
