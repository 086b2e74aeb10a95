#include "kronecker_sum.cuh"
#include "driver.hpp"

// integers: batch N O O2 I I2 b_symmetric a_same, strides of b (4), a (3), a2 (3); buffers: b a a2 out
static cuda_emulator::Register kronecker_sum("kronecker_sum", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using namespace torch_curvature::cuda;
    KroneckerProblem<T> p{};
    p.b = c.buffer<T>(0), p.a = c.buffer<T>(1), p.a2 = c.buffer<T>(2), p.batch = c[0];
    p.scatter = {{c[2], c[3], c[4], c[5], c[6] != 0, c[7] != 0}, c.buffer<T>(3)};
    p.b_batch = c[8], p.b_n = c[9], p.b_o = c[10], p.b_p = c[11];
    p.a_batch = c[12], p.a_n = c[13], p.a_i = c[14];
    p.a2_batch = c[15], p.a2_n = c[16], p.a2_j = c[17];
    p = kronecker_problem(p, c[1]);
    std::vector<accumulate_t<T>> partial(tile_product_workspace(p), static_cast<accumulate_t<T>>(NAN));
    launch_kronecker_sum(p, partial.data(), nullptr);
  });
});
