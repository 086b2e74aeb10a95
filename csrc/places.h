// Blocks that are written into their places of a larger matrix: where the places are, and what curvature_block demands.
#pragma once
#include "checks.h"

namespace torch_curvature {

// Where the entries (o, i) of one side of a block are in a larger matrix. The last input's may be apart (a bias).
struct Places {
  int64_t start, per_output, per_input, last;
  int64_t at(int64_t o, int64_t i, int64_t inputs) const {
    return last >= 0 && i == inputs - 1 ? last + o : start + o * per_output + i * per_input;
  }
};
inline Places check_places(const char* op, const char* name, const Sizes& given, int64_t O, int64_t I, int64_t P) {
  CURVATURE_CHECK(given.size() == 4, op, ": '", name, "' has ", given.size(),
                  " numbers, but four are needed: start, step per output, step per input, start of the last input's.");
  const Places x{given[0], given[1], given[2], given[3]};
  if (O == 0 || I == 0) return x;
  const int64_t regular = x.last < 0 ? I : I - 1;
  bool inside = x.last < 0 || x.last + O <= P;
  if (regular > 0)
    inside &= x.start >= 0 && x.per_output >= 0 && x.per_input >= 0 && x.per_output <= P && x.per_input <= P &&
              x.start <= P && double(x.start) + double(O - 1) * x.per_output + double(regular - 1) * x.per_input < P;
  CURVATURE_CHECK(inside, op, ": '", name, "' = ", shape_text(given), " puts some of the ", O, " x ", I,
                  " entries outside 'out', which has ", P, " rows and columns.");
  return x;
}

// curvature_block: m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2], D <= I, or its diagonal [N, O2], into
// out [P, P]
struct BlockSizes {
  int64_t N, O, O2, I, I2, D;
  Places rows, columns;
  bool diagonal = false;  // d[n, i, p] is zero but for i = p
};
inline BlockSizes check_curvature_block(const Tensor& m, const Tensor& a, const std::optional<Tensor>& a2,
                                        const std::optional<Tensor>& g, const std::optional<Tensor>& d,
                                        const Sizes& rows, const Sizes& columns, const Tensor& out) {
  const char* op = "curvature_block";
  const Tensor& right = a2 ? *a2 : a;
  check_floating(op, {"m", m});
  for (const Argument& x : {Argument{"a", a}, Argument{"a2", right}, Argument{"out", out}})
    check_alike(op, {"m", m}, x);
  check_exact_rank(op, {"m", m}, 3, "N, O, O2");
  check_exact_rank(op, {"a", a}, 2, "N, I");
  check_exact_rank(op, {"a2", right}, 2, "N, I2");
  check_exact_rank(op, {"out", out}, 2, "P, P");
  check_size(op, {"a", a}, 0, m.size(0), "N", {"m", m});
  check_size(op, {"a2", right}, 0, m.size(0), "N", {"m", m});
  check_size(op, {"out", out}, 1, out.size(0), "P", {"out", out});
  CURVATURE_CHECK(out.size(0) <= 1 || out.stride(1) == 1, op,
                  ": the rows of 'out' must be contiguous. Pass a matrix whose last axis has stride 1.");
  CURVATURE_CHECK(g.has_value() == d.has_value(), op, ": '", (g ? "g" : "d"), "' is given without '", (g ? "d" : "g"),
                  "'. Give both, or neither.");
  CURVATURE_CHECK(a2 || (!g && columns.empty() && m.size(1) == m.size(2)), op,
                  ": without 'a2' the block is one layer's with itself: 'm' must be symmetric, and 'g', 'd' and "
                  "'columns' are left out; got 'm' of shape ",
                  shape_text(m), ".");
  BlockSizes s{m.size(0), m.size(1), m.size(2), a.size(1), right.size(1), 0, {}, {}};
  if (g) {
    check_alike(op, {"m", m}, {"g", *g});
    check_alike(op, {"m", m}, {"d", *d});
    check_exact_rank(op, {"g", *g}, 2, "N, O");
    s.diagonal = d->dim() == 2;
    if (!s.diagonal) check_exact_rank(op, {"d", *d}, 3, "N, D, O2");
    check_size(op, {"g", *g}, 0, s.N, "N", {"m", m});
    check_size(op, {"g", *g}, 1, s.O, "O", {"m", m});
    check_size(op, {"d", *d}, 0, s.N, "N", {"m", m});
    check_size(op, {"d", *d}, s.diagonal ? 1 : 2, s.O2, "O2", {"m", m});
    s.D = d->size(1);
    CURVATURE_CHECK(s.D <= s.I, op, ": 'd' has shape ", shape_text(*d), ", but its axis ", s.diagonal ? "-1" : "-2",
                    " must be at most ", s.I, " (I) like that of 'a' ", shape_text(a), ".");
  }
  s.rows = check_places(op, "rows", rows, s.O, s.I, out.size(0));
  s.columns = a2 ? check_places(op, "columns", columns, s.O2, s.I2, out.size(0)) : s.rows;
  return s;
}
}  // namespace torch_curvature
