// The second half of jacobian_gram: where its values go, and the form that makes J in chunks.
#pragma once
#include "jacobian.h"

#include <vector>

namespace torch_curvature::cpu {

// out [V, N, V2, N2], written or added to.
template <class T>
struct GramOutput {
  using A = accumulate_t<T>;
  T* data;
  int64_t N, V2, N2;
  bool add;

  void put(int64_t v, int64_t n, int64_t w, int64_t m, A value) const {
    T& place = data[((v * N + n) * V2 + w) * N2 + m];
    place = static_cast<T>(add ? static_cast<A>(place) + value : value);
  }
  // Values [rows, cols], ld apart, of (v, n0..) by (w, m0..). In the symmetric case also the mirrored ones; in a block
  // on the diagonal, where both of a pair are computed, the first of the two counts for both.
  void write(const A* x, int64_t ld, int64_t v, int64_t n0, int64_t rows, int64_t w, int64_t m0, int64_t cols,
             bool same, bool diagonal) const {
    if (!(same && diagonal)) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) put(v, n0 + r, w, m0 + c, x[r * ld + c]);
      if (same)
        for (int64_t c = 0; c < cols; ++c)
          for (int64_t r = 0; r < rows; ++r) put(w, m0 + c, v, n0 + r, x[r * ld + c]);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t n = n0 + r, m = m0 + c;
        if (n > m || (n == m && v > w)) continue;
        put(v, n, w, m, x[r * ld + c]);
        if (n != m || v != w) put(w, m, v, n, x[r * ld + c]);
      }
  }
};

// Rows (n, v) of J, n-major, restricted to columns i in [i0, i0 + width) of all outputs [o0, o0 + height), packed as
// panels of rows: [panels][height * width][kCols].
template <class T>
void form_panel(const Jacobian<T>& J, int64_t panel, int64_t o0, int64_t height, int64_t i0, int64_t width,
                accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>;
  const JacobianSizes& s = J.size;
  const int64_t first = panel * W, count = std::min(W, s.N * s.V - first);
  const auto product = tile_product<A>();
  Buffer<A> ap(panels<A>(width) * s.S * W), gp(panels<A>(height) * s.S * W), tile(kRows * W);
  if (count < W) std::fill_n(packed, height * width * W, A(0));
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t n = (first + lane) / s.V, v = (first + lane) % s.V;
    if (lane == 0 || v == 0) pack_panels<T, A>(J.a_at(n) + i0 * J.ai, s.S, J.as, width, J.ai, ap);
    pack_panels<T, A>(J.g_at(v, n) + o0 * J.go, s.S, J.gs, height, J.go, gp);
    for (int64_t r = 0; r < divide_up(height, kRows); ++r)
      for (int64_t q = 0; q < panels<A>(width); ++q) {
        packed_tile<A>(product, gp, r, height, ap, q, width, s.S, tile);
        const int64_t rows = std::min(kRows, height - r * kRows), cols = panel_width<A>(width, q);
        for (int64_t k = 0; k < rows; ++k) {
          A* to = packed + ((r * kRows + k) * width + q * W) * W + lane;
          for (int64_t c = 0; c < cols; ++c) to[c * W] = tile[k * W + c];
        }
      }
  }
}

// Gram matrix through J itself, made chunk by chunk of its columns.
template <class T>
void gram_of_formed(const Jacobian<T>& left, const Jacobian<T>& right, bool same, bool threads, GramOutput<T> out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kBands = W / kRows, kTile = kRows * W, kDepth = 4096;
  const JacobianSizes &s = left.size, &z = right.size;
  const int64_t rows = s.V * s.N, cols = z.V * z.N, P = panels<A>(rows), Q = panels<A>(cols);
  const int64_t height = std::min(s.O, kDepth / W), wide = std::max<int64_t>(1, kDepth / (height * W)) * W;
  Buffer<A> x(P * height * std::min(s.I, wide) * W), y(same ? 0 : Q * height * std::min(s.I, wide) * W),
      sums(P * Q * kBands * kTile);
  const auto product = tile_product<A>();
  for (int64_t o0 = 0; o0 < s.O; o0 += height)
    for (int64_t i0 = 0; i0 < s.I; i0 += wide) {
      const int64_t h = std::min(height, s.O - o0), w = std::min(wide, s.I - i0), depth = h * w;
      share_tasks(P + (same ? 0 : Q), threads, [&](int64_t k) {
        k < P ? form_panel<T>(left, k, o0, h, i0, w, x + k * depth * W)
              : form_panel<T>(right, k - P, o0, h, i0, w, y + (k - P) * depth * W);
      });
      const A* other = same ? x : y;
      share_tasks(P * Q, threads, [&](int64_t k) {
        const int64_t p = k / Q, q = k % Q;
        if (same && p > q) return;
        for (int64_t band = 0; band < std::min(kBands, divide_up(rows - p * W, kRows)); ++band)
          product(x + p * depth * W + band * kRows, W, other + q * depth * W, W, {depth},
                  sums + (k * kBands + band) * kTile, std::min(kRows, rows - p * W - band * kRows),
                  panel_width<A>(cols, q), o0 + i0 > 0);
      });
    }
  share_tasks(P * Q, threads, [&](int64_t k) {
    const int64_t p = k / Q, q = k % Q;
    if (same && p > q) return;
    for (int64_t r = 0; r < std::min(W, rows - p * W); ++r)
      for (int64_t c = 0; c < std::min(W, cols - q * W); ++c) {
        const int64_t row = p * W + r, col = q * W + c;
        if (same && row > col) continue;
        const A value = sums[k * kBands * kTile + r * W + c];
        out.put(row % s.V, row / s.V, col % z.V, col / z.V, value);
        if (same && row != col) out.put(col % z.V, col / z.V, row % s.V, row / s.V, value);
      }
  });
}
}  // namespace torch_curvature::cpu
