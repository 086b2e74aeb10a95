#include "jacobian_norms.cuh"

#include "jacobian_case.hpp"

// integers: a Jacobian; buffers: g a out
static cuda_emulator::Register jacobian_norms("jacobian_norms", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    const auto j = jacobian<T>(c, 0, 1);
    const Workspace<accumulate_t<T>> partial(jacobian_norms_workspace(j));
    launch_jacobian_norms(j, c.buffer<T>(2), partial.data, nullptr);
  });
});
