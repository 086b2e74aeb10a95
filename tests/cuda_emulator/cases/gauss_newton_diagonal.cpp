#include "gauss_newton_diagonal.cuh"

#include "jacobian_case.hpp"

// integers: a Jacobian, whether there are signs; buffers: g a sign out
static cuda_emulator::Register gauss_newton_diagonal("gauss_newton_diagonal", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    const auto j = jacobian<T>(c, 0, 1);
    const Workspace<accumulate_t<T>> partial(gauss_newton_diagonal_workspace(j));
    launch_gauss_newton_diagonal<T>(j, c[10] ? c.buffer<T>(2) : nullptr, c.buffer<T>(3), partial.data, nullptr);
  });
});
