// What every operator demands of its arguments, and the sizes that follow. Shared by all backends, so that
// a call is refused with the same words wherever its tensors live.
#pragma once
#include "error.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace torch_curvature {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}
inline Sizes sizes_of(const Tensor& t) {
  auto s = t.sizes();
  return Sizes(s.begin(), s.end());
}
inline std::string shape_text(const Tensor& t) { return shape_text(sizes_of(t)); }

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    default: return torch::headeronly::toString(dtype);
  }
}

// One tensor argument of an operator, under the name the user knows it by.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

inline void check_floating(const char* op, const Argument& x) {
  switch (x.tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16: return;
    default:
      CURVATURE_CHECK(false, op, ": '", x.name, "' is ", dtype_name(x.tensor.scalar_type()),
                      ", but this operator takes float32, float64, bfloat16 and float16. Convert it, e.g. ", x.name,
                      ".float().");
  }
}
inline void check_alike(const char* op, const Argument& x, const Argument& y) {
  CURVATURE_CHECK(x.tensor.scalar_type() == y.tensor.scalar_type(), op, ": '", x.name, "' is ",
                  dtype_name(x.tensor.scalar_type()), " and '", y.name, "' is ", dtype_name(y.tensor.scalar_type()),
                  ". Convert one of them so that both have one dtype.");
  CURVATURE_CHECK(x.tensor.is_cpu() == y.tensor.is_cpu() && x.tensor.get_device_index() == y.tensor.get_device_index(),
                  op, ": '", x.name, "' and '", y.name,
                  "' are on different devices. Move one of them with .to(device).");
}
// `axes` names the trailing axes, e.g. "m, n".
inline void check_rank(const char* op, const Argument& x, int64_t rank, const char* axes) {
  CURVATURE_CHECK(x.tensor.dim() >= rank, op, ": '", x.name, "' has shape ", shape_text(x.tensor), ", but at least ",
                  rank, " axes are needed: [*, ", axes, "].");
}
// `letter` names the axis, `like` is the argument that it must agree with.
inline void check_size(const char* op, const Argument& x, int64_t axis, int64_t expected, const char* letter,
                       const Argument& like) {
  CURVATURE_CHECK(x.tensor.size(axis) == expected, op, ": '", x.name, "' has shape ", shape_text(x.tensor),
                  ", but its axis ", axis - x.tensor.dim(), " must be ", expected, " (", letter, ") like that of '",
                  like.name, "' ", shape_text(like.tensor), ".");
}

inline int64_t product(const Sizes& sizes) {
  int64_t p = 1;
  for (int64_t s : sizes) p *= s;
  return p;
}

// The leading axes of x and y (all but the last `x_core` and `y_core`), broadcast against each other as torch does.
inline Sizes broadcast_batch(const char* op, const Argument& x, int64_t x_core, const Argument& y, int64_t y_core) {
  const int64_t nx = x.tensor.dim() - x_core, ny = y.tensor.dim() - y_core, n = nx > ny ? nx : ny;
  Sizes batch(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t ix = i - (n - nx), iy = i - (n - ny);
    const int64_t sx = ix < 0 ? 1 : x.tensor.size(ix), sy = iy < 0 ? 1 : y.tensor.size(iy);
    CURVATURE_CHECK(sx == sy || sx == 1 || sy == 1, op, ": the leading axes of '", x.name, "' ", shape_text(x.tensor),
                    " and '", y.name, "' ", shape_text(y.tensor), " do not broadcast: ", sx, " against ", sy, ".");
    batch[i] = sx == 1 ? sy : sx;
  }
  return batch;
}

inline void check_out(const char* op, const Tensor& out, const Tensor& like, const Sizes& expected) {
  check_alike(op, {"out", out}, {"the inputs", like});
  CURVATURE_CHECK(sizes_of(out) == expected, op, ": 'out' has shape ", shape_text(out), ", but the result has shape ",
                  shape_text(expected), ".");
  CURVATURE_CHECK(out.is_contiguous(), op,
                  ": 'out' must be contiguous. Pass a contiguous tensor, or leave 'out' away.");
}

// outer: u [*, m], v [*, n] -> [*, m, n]
struct OuterSizes {
  Sizes batch, result;
  int64_t m, n;
};
inline OuterSizes check_outer(const Tensor& u, const Tensor& v) {
  const char* op = "outer";
  check_floating(op, {"u", u});
  check_floating(op, {"v", v});
  check_alike(op, {"u", u}, {"v", v});
  check_rank(op, {"u", u}, 1, "m");
  check_rank(op, {"v", v}, 1, "n");
  OuterSizes s{broadcast_batch(op, {"u", u}, 1, {"v", v}, 1), {}, u.size(u.dim() - 1), v.size(v.dim() - 1)};
  s.result = s.batch;
  s.result.insert(s.result.end(), {s.m, s.n});
  return s;
}

// frobenius_inner: a [*, m, n], b [*, m, n] -> [*]
struct FrobeniusSizes {
  Sizes batch;
  int64_t m, n;
};
inline FrobeniusSizes check_frobenius_inner(const Tensor& a, const Tensor& b) {
  const char* op = "frobenius_inner";
  check_floating(op, {"a", a});
  check_floating(op, {"b", b});
  check_alike(op, {"a", a}, {"b", b});
  check_rank(op, {"a", a}, 2, "m, n");
  check_rank(op, {"b", b}, 2, "m, n");
  FrobeniusSizes s{broadcast_batch(op, {"a", a}, 2, {"b", b}, 2), a.size(a.dim() - 2), a.size(a.dim() - 1)};
  check_size(op, {"b", b}, b.dim() - 2, s.m, "m", {"a", a});
  check_size(op, {"b", b}, b.dim() - 1, s.n, "n", {"a", a});
  return s;
}

// kronecker_sum: b [*, N, O, O2], a [*, N, I], a2 [*, N, I2] -> [*, O I, O2 I2]
struct KroneckerSizes {
  Sizes batch, result;
  int64_t N, O, O2, I, I2;
};
inline KroneckerSizes check_kronecker_sum(const Tensor& b, const Tensor& a, const std::optional<Tensor>& a2,
                                          bool symmetric) {
  const char* op = "kronecker_sum";
  const Tensor& right = a2 ? *a2 : a;
  for (const Argument& x : {Argument{"b", b}, Argument{"a", a}, Argument{"a2", right}}) check_floating(op, x);
  check_alike(op, {"b", b}, {"a", a});
  check_alike(op, {"b", b}, {"a2", right});
  check_rank(op, {"b", b}, 3, "N, O, O2");
  check_rank(op, {"a", a}, 2, "N, I");
  check_rank(op, {"a2", right}, 2, "N, I2");
  KroneckerSizes s{{},
                   {},
                   b.size(b.dim() - 3),
                   b.size(b.dim() - 2),
                   b.size(b.dim() - 1),
                   a.size(a.dim() - 1),
                   right.size(right.dim() - 1)};
  check_size(op, {"a", a}, a.dim() - 2, s.N, "N", {"b", b});
  check_size(op, {"a2", right}, right.dim() - 2, s.N, "N", {"b", b});
  CURVATURE_CHECK(!symmetric || (!a2 && s.O == s.O2), op,
                  ": symmetric=True says that b[n] is symmetric and that 'a2' is left out; got ",
                  (a2 ? "an 'a2'" : "no 'a2'"), " and 'b' of shape ", shape_text(b), ".");
  s.batch = broadcast_batch(op, {"b", b}, 3, {"a", a}, 2);
  if (a2) {
    // The third operand may widen the batch further; its own axes are checked against the first two.
    const Sizes others = broadcast_batch(op, {"b", b}, 3, {"a2", right}, 2);
    const Sizes also = broadcast_batch(op, {"a", a}, 2, {"a2", right}, 2);
    Sizes widest = s.batch;
    for (const Sizes* z : {&others, &also})
      for (size_t i = 0; i < z->size(); ++i) {
        if (widest.size() < z->size()) widest.insert(widest.begin(), z->size() - widest.size(), 1);
        int64_t& w = widest[widest.size() - 1 - i];
        const int64_t x = (*z)[z->size() - 1 - i];
        if (w == 1) w = x;
      }
    s.batch = widest;
  }
  s.result = s.batch;
  s.result.insert(s.result.end(), {s.O * s.I, s.O2 * s.I2});
  return s;
}

inline void check_exact_rank(const char* op, const Argument& x, int64_t rank, const char* axes) {
  CURVATURE_CHECK(x.tensor.dim() == rank, op, ": '", x.name, "' has shape ", shape_text(x.tensor),
                  ", but it must have ", rank, " axes: [", axes, "].");
}

// Jacobians J[v, n] = sum_s g[v, n, s] (x) a[n, s]: g [V, N, S, O], a [N, S, I]
struct JacobianSizes {
  int64_t V, N, S, O, I;
};
inline JacobianSizes check_jacobian(const char* op, const Argument& g, const Argument& a) {
  check_floating(op, g);
  check_floating(op, a);
  check_alike(op, g, a);
  check_exact_rank(op, g, 4, "V, N, S, O");
  check_exact_rank(op, a, 3, "N, S, I");
  const JacobianSizes s{g.tensor.size(0), g.tensor.size(1), g.tensor.size(2), g.tensor.size(3), a.tensor.size(2)};
  check_size(op, a, 0, s.N, "N", g);
  check_size(op, a, 1, s.S, "S", g);
  return s;
}
inline JacobianSizes check_signed_jacobian(const char* op, const Tensor& g, const Tensor& a,
                                           const std::optional<Tensor>& sign) {
  const JacobianSizes s = check_jacobian(op, {"g", g}, {"a", a});
  if (sign) {
    check_alike(op, {"g", g}, {"sign", *sign});
    check_exact_rank(op, {"sign", *sign}, 2, "V, N");
    check_size(op, {"sign", *sign}, 0, s.V, "V", {"g", g});
    check_size(op, {"sign", *sign}, 1, s.N, "N", {"g", g});
  }
  return s;
}

// jacobian_norms -> [V, N]
inline JacobianSizes check_jacobian_norms(const Tensor& g, const Tensor& a) {
  return check_jacobian("jacobian_norms", {"g", g}, {"a", a});
}

// jacobian_gram: a second pair g2 [V2, N2, S2, O], a2 [N2, S2, I], or none -> [V, N, V2, N2]
struct GramSizes {
  JacobianSizes left, right;
  Sizes result;
};
inline GramSizes check_jacobian_gram(const Tensor& g, const Tensor& a, const std::optional<Tensor>& g2,
                                     const std::optional<Tensor>& a2) {
  const char* op = "jacobian_gram";
  CURVATURE_CHECK(g2.has_value() == a2.has_value(), op, ": '", (g2 ? "g2" : "a2"), "' is given without '",
                  (g2 ? "a2" : "g2"), "'. Give both, or leave both out for the Gram matrix of g and a themselves.");
  const JacobianSizes left = check_jacobian(op, {"g", g}, {"a", a});
  GramSizes s{left, g2 ? check_jacobian(op, {"g2", *g2}, {"a2", *a2}) : left, {}};
  if (g2) {
    check_alike(op, {"g", g}, {"g2", *g2});
    check_size(op, {"g2", *g2}, 3, left.O, "O", {"g", g});
    check_size(op, {"a2", *a2}, 2, left.I, "I", {"a", a});
  }
  s.result = {s.left.V, s.left.N, s.right.V, s.right.N};
  return s;
}

// gauss_newton_block -> [O I, O I]; gauss_newton_diagonal -> [O, I]
inline JacobianSizes check_gauss_newton_block(const Tensor& g, const Tensor& a, const std::optional<Tensor>& sign) {
  return check_signed_jacobian("gauss_newton_block", g, a, sign);
}
inline JacobianSizes check_gauss_newton_diagonal(const Tensor& g, const Tensor& a, const std::optional<Tensor>& sign) {
  return check_signed_jacobian("gauss_newton_diagonal", g, a, sign);
}
}  // namespace torch_curvature
