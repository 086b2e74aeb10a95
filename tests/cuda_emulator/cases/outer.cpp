#include "outer.cuh"
#include "driver.hpp"

// integers: batch m n, strides u_batch u_row v_batch v_col; buffers: u v out
static cuda_emulator::Register outer("outer", [](const cuda_emulator::Case& c) {
  dispatch(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const torch_curvature::cuda::OuterShape shape{c[0], c[1], c[2], c[3], c[4], c[5], c[6]};
    torch_curvature::cuda::launch_outer<T>(c.buffer<T>(0), c.buffer<T>(1), c.buffer<T>(2), shape, nullptr);
  });
});
