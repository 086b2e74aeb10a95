// jacobian_gram through J itself for few rows (n, v), formed in pieces of its columns that stay in cache.
//
// out[v, n, w, m] = sum_oi J[v, n, o, i] J[w, m, o, i], J[v, n] = sum_s g[v, n, s] (x) a[n, s], of one batch with
// itself. A chunk is a few outputs o by a few inputs i: for every row the product over positions leaves its tiles one
// after the other in a row of the chunk; the inner products of the rows are added to sums of the chunk's piece, and the
// pieces are summed in order. Multiply-adds: R S O I + R (R + 1) / 2 O I for R = V N rows. Bytes: g once for every
// kInputs inputs, a once for every chunk of outputs; J never leaves the last cache.
#pragma once
#include "jacobian_gram.h"
#include "overlaps.h"

namespace torch_curvature::cpu {

// How the columns of J are cut: `wide` chunks of inputs for every chunk of `height` outputs.
template <class A>
struct Chunks {
  static constexpr int64_t kInputs = 2 * kCols<A>, kHeight = 128, kFew = 8, kElements = (1 << 20) / sizeof(A);
  int64_t most, wide, height, count;
  Chunks(int64_t R, int64_t O, int64_t I)
      : most(std::min(kInputs, divide_up(I, kCols<A>) * kCols<A>)),
        wide(divide_up(I, kInputs)),
        height(std::min(
            {divide_up(O, kRows) * kRows, kHeight, std::max<int64_t>(1, kElements / (R * most * kRows)) * kRows})),
        count(divide_up(O, height) * wide) {
    while (count < kFew && height >= 8 * kRows)  // enough for the threads
      height = divide_up(height, 2 * kRows) * kRows, count = divide_up(O, height) * wide;
  }
};

// Where there are more rows, panels of them are multiplied faster; of few chunks the threads have no use.
template <class A>
bool worth_rows(int64_t R, int64_t O, int64_t I) {
  return R <= 64 && Chunks<A>(R, O, I).count >= 4;
}

template <class T>
void gram_of_rows(const Jacobian<T>& J, bool threads, GramOutput<T> out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W, kInputs = Chunks<A>::kInputs, kPieces = 32, kLine = 64 / sizeof(A);
  const JacobianSizes& s = J.size;
  const int64_t R = s.V * s.N;
  const auto [most, wide, height, chunks] = Chunks<A>(R, s.O, s.I);
  const int64_t pieces = std::min(chunks, kPieces), line = height * most + kLine;  // in different sets of a cache
  const auto product = tile_product<A>();
  const auto kernel = overlaps<A>();
  Buffer<A> sums(pieces * R * R);
  share_tasks(pieces, threads, [&](int64_t piece) {
    Buffer<A> rows(R * line), of_a(s.S * most), of_g(s.S * divide_up(height, W) * W);
    A* own = sums + piece * R * R;
    std::fill_n(own, R * R, A(0));
    for (int64_t chunk = piece * chunks / pieces; chunk < (piece + 1) * chunks / pieces; ++chunk) {
      const int64_t o0 = chunk / wide * height, outputs = std::min(height, s.O - o0), bands = divide_up(outputs, kRows);
      const int64_t i0 = chunk % wide * kInputs, inputs = std::min(kInputs, s.I - i0);
      if (outputs % kRows || inputs % W) std::fill_n(static_cast<A*>(rows), R * line, A(0));
      for (int64_t n = 0; n < s.N; ++n) {
        pack_panels<T, A>(J.a_at(n) + i0 * J.ai, s.S, J.as, inputs, J.ai, of_a);
        for (int64_t v = 0; v < s.V; ++v) {
          pack_panels<T, A>(J.g_at(v, n) + o0 * J.go, s.S, J.gs, outputs, J.go, of_g);
          A* to = rows + (n * s.V + v) * line;
          for (int64_t q = 0; q < panels<A>(inputs); ++q)
            for (int64_t b = 0; b < bands; ++b, to += kTile)
              packed_tile<A>(product, of_g, b, outputs, of_a, q, inputs, s.S, to);
        }
      }
      kernel.inner(rows, line, R, panels<A>(inputs) * bands * kTile, own);
    }
  });
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = r; c < R; ++c) {
      A value = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) value += sums[(piece * R + r) * R + c];
      out.put(r % s.V, r / s.V, c % s.V, c / s.V, value);
      if (r != c) out.put(c % s.V, c / s.V, r % s.V, r / s.V, value);
    }
}
}  // namespace torch_curvature::cpu
