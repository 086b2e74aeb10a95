// kronecker_sum: G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j]
//
// Shapes: b [N, O, O2], a [N, I], a2 [N, I2], G [O I, O2 I2]. How, flops and bytes: kronecker_core.h.
#include "kronecker_core.h"

namespace torch_curvature::cpu {
namespace {
void kronecker_into(const Tensor& b, const Tensor& a, const std::optional<Tensor>& a2, bool symmetric,
                    const KroneckerSizes& s, Tensor& out) {
  const int64_t B = product(s.batch), each = s.O * s.I * s.O2 * s.I2;
  if (B * each == 0) return;
  if (s.N == 0) {
    torch::stable::zero_(out);
    return;
  }
  const auto sb = strided<3>(b, s.batch);
  const auto sa = strided<2>(a, s.batch), sa2 = strided<2>(a2 ? *a2 : a, s.batch);
  dispatch_floating(b.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    for (int64_t k = 0; k < B; ++k) {
      const T* values = sb.template data<T>() + k * sb.batch;
      const KroneckerProblem<T> problem{sa.template data<T>() + k * sa.batch,
                                        sa2.template data<T>() + k * sa2.batch,
                                        sa.core[0],
                                        sa.core[1],
                                        sa2.core[0],
                                        sa2.core[1],
                                        s.N,
                                        s.O,
                                        s.O2,
                                        s.I,
                                        s.I2,
                                        !a2,
                                        symmetric,
                                        static_cast<T*>(out.data_ptr()) + k * each};
      kronecker<T>(problem, [&](const Pair* pairs, int64_t count, A* to) {
        copy_pairs<T, A>(values, sb.core[0], sb.core[1], sb.core[2], pairs, count, s.N, to);
      });
    }
  });
}

Tensor kronecker_sum(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  Tensor out = new_result("kronecker_sum", b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
  return out;
}

void kronecker_sum_out(const Tensor& b, const Tensor& a, std::optional<Tensor> a2, bool symmetric, Tensor out) {
  const KroneckerSizes s = check_kronecker_sum(b, a, a2, symmetric);
  check_out("kronecker_sum", out, b, s.result);
  kronecker_into(b, a, a2, symmetric, s, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) {
  m.impl("kronecker_sum", TORCH_BOX(&kronecker_sum));
  m.impl("kronecker_sum_out", TORCH_BOX(&kronecker_sum_out));
}
}  // namespace torch_curvature::cpu
