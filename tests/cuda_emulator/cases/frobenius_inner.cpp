#include "frobenius_inner.cuh"
#include "driver.hpp"

// integers: batch m n, strides of x (batch row col), strides of y; buffers: x y out partial
static cuda_emulator::Register frobenius_inner("frobenius_inner", [](const cuda_emulator::Case& c) {
  dispatch(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    using A = accumulate_t<T>;
    std::vector<A> partial(frobenius_workspace(c[0], c[1], c[2]), static_cast<A>(NAN));
    launch_frobenius_inner<T>({c.buffer<T>(0), c[3], c[4], c[5]}, {c.buffer<T>(1), c[6], c[7], c[8]}, c.buffer<T>(2),
                              c[0], c[1], c[2], partial.empty() ? nullptr : partial.data(), nullptr);
  });
});
