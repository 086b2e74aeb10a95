// Registers curvature_block for CUDA.
#include "curvature_block.cuh"

#include "../places.h"
#include "registration.h"

namespace torch_curvature::cuda {
namespace {

LayerPlaces layer_places(const torch_curvature::Places& x, int64_t inputs) {
  return {x.start, x.per_output, x.per_input, x.last, inputs - 1};
}

template <class Problem>
void run_block(const Problem& p, const Tensor& like, cudaStream_t stream) {
  const Workspace<typename Problem::A> partial(like, tile_product_workspace(p));
  launch_tile_product(p, partial.data(), stream);
}

void curvature_block(const Tensor& m, const Tensor& a, std::optional<Tensor> a2, std::optional<Tensor> g,
                     std::optional<Tensor> d, std::vector<int64_t> rows, std::vector<int64_t> columns, bool add,
                     Tensor out) {
  const BlockSizes s = check_curvature_block(m, a, a2, g, d, rows, columns, out);
  CURVATURE_CHECK(!s.diagonal, "curvature_block: 'd' must be [N, D, O2] on CUDA.");
  check_counts({s.N, s.O, s.O2, s.I, s.I2});
  if (s.O * s.I * s.O2 * s.I2 == 0 || (s.N == 0 && add)) return;
  const OnDevice here(m);
  const bool moves = g && s.D;
  const auto sm = strided<3>(m, {}), sd = strided<3>(moves ? *d : m, {});
  const auto sa = strided<2>(a, {}), sr = strided<2>(a2 ? *a2 : a, {}), sg = strided<2>(moves ? *g : a, {});
  dispatch_products(m.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SymmetricMatrix<T> matrix{static_cast<T*>(out.data_ptr()), out.stride(0), add};
    if (a2) {
      CrossBlockProblem<T> p{};
      p.m = sm.data<T>(), p.m_n = sm.core[0], p.m_o = sm.core[1], p.m_p = sm.core[2];
      p.a = sa.data<T>(), p.a_n = sa.core[0], p.a_i = sa.core[1];
      p.a2 = sr.data<T>(), p.a2_n = sr.core[0], p.a2_j = sr.core[1];
      if (moves) {
        p.g = sg.data<T>(), p.g_n = sg.core[0], p.g_o = sg.core[1];
        p.d = sd.data<T>(), p.d_n = sd.core[0], p.d_i = sd.core[1], p.d_p = sd.core[2];
      }
      p.O = s.O, p.I = s.I, p.D = s.D, p.out = matrix;
      p.row_places = layer_places(s.rows, s.I), p.column_places = layer_places(s.columns, s.I2);
      run_block(cross_block(p, s.N, s.O2, s.I2), m, here.stream());
    } else {
      OwnBlockProblem<T> p{};
      p.b = sm.data<T>(), p.b_n = sm.core[0], p.b_o = sm.core[1], p.b_p = sm.core[2];
      p.a = p.a2 = sa.data<T>(), p.a_n = p.a2_n = sa.core[0], p.a_i = p.a2_j = sa.core[1], p.batch = 1;
      p.scatter = {{s.O, s.O, s.I, s.I, true, true}, matrix, layer_places(s.rows, s.I)};
      run_block(kronecker_problem(p, s.N), m, here.stream());
    }
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CUDA, m) { m.impl("curvature_block", TORCH_BOX(&curvature_block)); }
}  // namespace torch_curvature::cuda
