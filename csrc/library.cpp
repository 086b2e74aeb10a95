// Every operator's schema, and the Python module that carries build information and brings the operators in.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "precision.h"

// `op` allocates its result; `op_out` writes into a contiguous tensor of the right shape.
STABLE_TORCH_LIBRARY(torch_curvature, m) {
  // [*, m], [*, n] -> [*, m, n]
  m.def("outer(Tensor u, Tensor v) -> Tensor");
  m.def("outer_out(Tensor u, Tensor v, Tensor(a!) out) -> ()");
  // [*, m, n], [*, m, n] -> [*]
  m.def("frobenius_inner(Tensor a, Tensor b) -> Tensor");
  // [*, N, O, O2], [*, N, I], [*, N, I2] -> [*, O I, O2 I2]
  m.def("kronecker_sum(Tensor b, Tensor a, Tensor? a2, bool symmetric) -> Tensor");
  m.def("kronecker_sum_out(Tensor b, Tensor a, Tensor? a2, bool symmetric, Tensor(a!) out) -> ()");
  // m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2] -> a block between the parameters of two layers (of one
  // with itself where a2 is left out), at the places `rows` and `columns` of the symmetric matrix out [P, P]
  m.def(
      "curvature_block(Tensor m, Tensor a, Tensor? a2, Tensor? g, Tensor? d, int[] rows, int[] columns, bool add, "
      "Tensor(a!) out) -> ()");
  // Contractions of Jacobians J[v, n] = sum_s g[v, n, s] (x) a[n, s], with g [V, N, S, O], a [N, S, I], sign [V, N].
  // -> [V, N], squared norms
  m.def("jacobian_norms(Tensor g, Tensor a) -> Tensor");
  // g2 [V2, N2, S2, O], a2 [N2, S2, I] (g, a where left out) -> [V, N, V2, N2], inner products; `_add` adds them to out
  m.def("jacobian_gram(Tensor g, Tensor a, Tensor? g2, Tensor? a2) -> Tensor");
  m.def("jacobian_gram_add(Tensor g, Tensor a, Tensor? g2, Tensor? a2, Tensor(a!) out) -> ()");
  // -> [O I, O I], sum_vn sign[v, n] vec(J) vec(J)^T
  m.def("gauss_newton_block(Tensor g, Tensor a, Tensor? sign) -> Tensor");
  m.def("gauss_newton_block_out(Tensor g, Tensor a, Tensor? sign, Tensor(a!) out) -> ()");
  // -> [O, I], the diagonal of that block
  m.def("gauss_newton_diagonal(Tensor g, Tensor a, Tensor? sign) -> Tensor");
}

namespace {
const char* instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#if !defined(__clang__)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
#endif
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}
}  // namespace

bool torch_curvature::tf32_allowed() {
  if (!Py_IsInitialized()) return false;
  const pybind11::gil_scoped_acquire lock;
  try {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<pybind11::object> setting;
    setting.call_once_and_store_result(
        [] { return pybind11::module_::import("torch._C").attr("_get_fp32_precision_getter"); });
    return setting.get_stored()("cuda", "matmul").cast<std::string>() == "tf32";
  } catch (const std::exception&) {
    return false;  // no such setting: true float32
  }
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of torch_curvature, registered as torch.ops.torch_curvature.*";
  m.def("tf32_allowed", &torch_curvature::tf32_allowed);
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"compiler", __VERSION__},
#ifdef TORCH_CURVATURE_CUDA
        {"cuda", TORCH_CURVATURE_CUDA},
#else
        {"cuda", "not compiled"},
#endif
        {"instruction set", instruction_set()},
    };
  });
}
