#include "gauss_newton_block.cuh"

#include "jacobian_case.hpp"

// integers: a Jacobian, whether there are signs; buffers: g a sign out
static cuda_emulator::Register gauss_newton_block("gauss_newton_block", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    const auto plan = block_plan<T>(jacobian<T>(c, 0, 1), c[10] ? c.buffer<T>(2) : nullptr, c.buffer<T>(3));
    const Workspace<accumulate_t<T>> workspace(gauss_newton_block_workspace(plan));
    launch_gauss_newton_block(plan, workspace.data, nullptr);
  });
});
