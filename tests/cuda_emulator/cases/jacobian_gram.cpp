#include "gram_by_jacobian.cuh"
#include "jacobian_case.hpp"

// integers: a Jacobian, another (the same where symmetric), symmetric, add; buffers: g a g2 a2 out
static cuda_emulator::Register jacobian_gram("jacobian_gram", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    const bool symmetric = c[20];
    const auto plan =
        gram_plan(jacobian<T>(c, 0, 1), jacobian<T>(c, symmetric ? 0 : 2, symmetric ? 1 : 3, 10), symmetric);
    const Workspace<accumulate_t<T>> workspace(jacobian_gram_workspace(plan));
    launch_jacobian_gram(plan, c.buffer<T>(4), c[21] != 0, workspace.data, nullptr);
  });
});
