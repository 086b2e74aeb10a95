#include "curvature_block.cuh"
#include "jacobian_case.hpp"

using namespace torch_curvature::cuda;

static LayerPlaces places(const cuda_emulator::Case& c, size_t at, int64_t inputs) {
  return {c[at], c[at + 1], c[at + 2], c[at + 3], inputs - 1};
}

// integers: N O O2 I I2 D, one layer, g and d given, add, step of out, strides of m (3), a (2), a2 (2), g (2), d (3),
// places of rows (4), of columns (4); buffers: m a a2 g d out
static cuda_emulator::Register curvature_block("curvature_block", [](const cuda_emulator::Case& c) {
  dispatch_products(c, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SymmetricMatrix<T> out{c.buffer<T>(5), c[9], c[8] != 0};
    auto launch_with_workspace = [](const auto& p) {
      const Workspace<accumulate_t<T>> partial(tile_product_workspace(p));
      launch_tile_product(p, partial.data, nullptr);
    };
    if (c[6]) {
      OwnBlockProblem<T> p{};
      p.b = c.buffer<T>(0), p.a = p.a2 = c.buffer<T>(1), p.batch = 1;
      p.scatter = {{c[1], c[1], c[3], c[3], true, true}, out, places(c, 22, c[3])};
      p.b_n = c[10], p.b_o = c[11], p.b_p = c[12], p.a_n = p.a2_n = c[13], p.a_i = p.a2_j = c[14];
      launch_with_workspace(kronecker_problem(p, c[0]));
    } else {
      CrossBlockProblem<T> p{};
      p.m = c.buffer<T>(0), p.a = c.buffer<T>(1), p.a2 = c.buffer<T>(2);
      if (c[7]) p.g = c.buffer<T>(3), p.d = c.buffer<T>(4);
      p.m_n = c[10], p.m_o = c[11], p.m_p = c[12], p.a_n = c[13], p.a_i = c[14], p.a2_n = c[15], p.a2_j = c[16];
      p.g_n = c[17], p.g_o = c[18], p.d_n = c[19], p.d_i = c[20], p.d_p = c[21];
      p.O = c[1], p.I = c[3], p.D = c[5], p.out = out;
      p.row_places = places(c, 22, c[3]), p.column_places = places(c, 26, c[4]);
      launch_with_workspace(cross_block(p, c[0], c[2], c[4]));
    }
  });
});
