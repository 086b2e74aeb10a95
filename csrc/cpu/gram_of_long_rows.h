// jacobian_gram of few rows that are long: one position, a = 1 or a number for each sample, as Jacobians that are
// formed have it.
//
// out[v, n, w, m] = a[n] a[m] sum_o g[v, n, o] g[w, m, o] of one batch with itself. The outputs are cut into pieces, a
// task each, whose sums are added in order. Of a piece kStep outputs of all R = V N rows are packed in panels that stay
// in the second cache while all pairs of panels are multiplied. R (R + 1) O flops; bytes: g once.
#pragma once
#include "jacobian_gram.h"

namespace torch_curvature::cpu {

template <class A>
constexpr int64_t kLongStep = 4096 / sizeof(A);

inline bool worth_long_rows(int64_t R, int64_t O, int64_t I, int64_t step) {
  return I == 1 && R <= 256 && O >= 4 * step && O >= 8 * R;
}

template <class T>
void gram_of_long_rows(const Jacobian<T>& J, bool threads, GramOutput<T> out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W, kBands = W / kRows, kStep = kLongStep<A>, kPieces = 16;
  const JacobianSizes& s = J.size;
  const int64_t R = s.V * s.N, P = panels<A>(R), steps = divide_up(s.O, kStep), pieces = std::min(steps, kPieces);
  const int64_t each = P * P * W * W;
  const auto product = tile_product<A>();
  Buffer<A> sums(pieces * each);
  share_tasks(pieces, threads, [&](int64_t piece) {
    Buffer<A> packed(P * kStep * W);
    A* own = sums + piece * each;
    const int64_t begin = piece * steps / pieces * kStep, end = std::min(s.O, (piece + 1) * steps / pieces * kStep);
    for (int64_t o = begin; o < end; o += kStep) {
      const int64_t depth = std::min(kStep, end - o);
      for (int64_t p = 0; p < P; ++p) {
        const T* rows[W];
        for (int64_t c = 0; c < panel_width<A>(R, p); ++c)
          rows[c] = J.g_at((p * W + c) % s.V, (p * W + c) / s.V) + o * J.go;
        pack_rows<T, A>(rows, J.go, depth, panel_width<A>(R, p), packed + p * kStep * W);
      }
      for (int64_t p = 0; p < P; ++p)
        for (int64_t q = p; q < P; ++q)
          for (int64_t band = 0; band < kBands && p * W + band * kRows < R; ++band)
            product(packed + p * kStep * W + band * kRows, W, packed + q * kStep * W, W, {depth},
                    own + (p * P + q) * W * W + band * kTile, std::min(kRows, R - p * W - band * kRows),
                    panel_width<A>(R, q), o > begin);
    }
  });
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = r; c < R; ++c) {
      const int64_t v = r % s.V, n = r / s.V, w = c % s.V, m = c / s.V;
      A value = 0;
      for (int64_t piece = 0; piece < pieces; ++piece)
        value += sums[piece * each + (r / W * P + c / W) * W * W + r % W * W + c % W];
      value *= static_cast<A>(*J.a_at(n)) * static_cast<A>(*J.a_at(m));
      out.put(v, n, w, m, value);
      if (r != c) out.put(w, m, v, n, value);
    }
}
}  // namespace torch_curvature::cpu
