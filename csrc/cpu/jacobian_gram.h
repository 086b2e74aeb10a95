// The second half of jacobian_gram: where its values go, and the form that makes J in chunks.
#pragma once
#include "jacobian.h"

#include <vector>

namespace torch_curvature::cpu {

// Rows [rows, cols] of values, ld apart, written or added to rows `stride` apart.
template <class T, class A>
CURVATURE_CLONES void put_rows(const A* __restrict__ x, int64_t ld, int64_t rows, int64_t cols, T* __restrict__ to,
                               int64_t stride, bool add) {
  for (int64_t r = 0; r < rows; ++r, x += ld, to += stride) {
    if (add)
      for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<T>(static_cast<A>(to[c]) + x[c]);
    else if (std::is_same_v<T, A> && cols == kRows)  // no call for a few bytes
      __builtin_memcpy(to, x, kRows * sizeof(T));
    else
      for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<T>(x[c]);
  }
}

// The transpose of a tile of at most kCols rows and columns; rows of the result kCols apart.
template <class A>
CURVATURE_CLONES void transpose_tile(const A* x, int64_t ld, int64_t rows, int64_t cols, A* __restrict__ out) {
  transpose_rows<A, A>(x, ld, rows, cols, out);
}

// out [V, N, V2, N2], written or added to.
template <class T>
struct GramOutput {
  using A = accumulate_t<T>;
  T* data;
  int64_t N, V2, N2;
  bool add;

  T* row(int64_t v, int64_t n, int64_t w) const { return data + ((v * N + n) * V2 + w) * N2; }
  void put(T& place, A value) const { place = static_cast<T>(add ? static_cast<A>(place) + value : value); }
  void put(int64_t v, int64_t n, int64_t w, int64_t m, A value) const { put(row(v, n, w)[m], value); }

  // Values [rows, cols], ld apart, of (v, n0..) by (w, m0..). In the symmetric case also the mirrored ones; in a block
  // on the diagonal (v = w, the same samples), where both of a pair are computed, the first of the two counts for both.
  void write(const A* x, int64_t ld, int64_t v, int64_t n0, int64_t rows, int64_t w, int64_t m0, int64_t cols,
             bool same, bool diagonal) const {
    if (!(same && diagonal)) {
      put_rows<T, A>(x, ld, rows, cols, row(v, n0, w) + m0, V2 * N2, add);
      constexpr int64_t W = kCols<A>;
      alignas(64) A turned[W * W];
      for (int64_t r = 0; same && r < rows; r += W)
        for (int64_t c = 0; c < cols; c += W) {
          transpose_tile<A>(x + r * ld + c, ld, std::min(W, rows - r), std::min(W, cols - c), turned);
          put_rows<T, A>(turned, W, std::min(W, cols - c), std::min(W, rows - r), row(w, m0 + c, v) + n0 + r, V2 * N2,
                         add);
        }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* to = row(v, n0 + r, w) + m0;
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t n = n0 + r, m = m0 + c;
        if (n > m) continue;
        put(to[c], x[r * ld + c]);
        if (n != m) put(w, m, v, n, x[r * ld + c]);
      }
    }
  }
};

// Lanes of a panel that are formed together: those of a cache line, which two threads must not share.
template <class A>
constexpr int64_t kLanesFormed = 64 / sizeof(A);

// Rows (n, v) of J, n-major, first.. , restricted to columns i in [i0, i0 + width) of outputs [o0, o0 + height),
// transposed into kLanesFormed lanes of a panel: packed[(o, i)][lane], lines kCols apart; `swapped`: [(i, o)][lane].
template <class T>
void form_lanes(const Jacobian<T>& J, int64_t first, int64_t o0, int64_t height, int64_t i0, int64_t width,
                bool swapped, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, L = kLanesFormed<A>;
  const JacobianSizes& s = J.size;
  const int64_t depth = height * width, line = depth + W, count = std::clamp<int64_t>(s.N * s.V - first, 0, L);
  const Columns outputs{height, J.go, J.gs}, inputs{width, J.ai, J.as};
  const Columns x = swapped ? inputs : outputs, y = swapped ? outputs : inputs;
  SampleProduct<T> product(s.S, x, y);
  Buffer<A> tile(kRows * W), rows(L * line);
  std::fill_n(rows + count * line, (L - count) * line, A(0));
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t n = (first + lane) / s.V, v = (first + lane) % s.V;
    const T *a = J.a_at(n) + i0 * J.ai, *g = J.g_at(v, n) + o0 * J.go;
    if (lane == 0 || v == 0) swapped ? product.set_x(a) : product.set_y(a);
    swapped ? product.set_y(g) : product.set_x(g);
    for (int64_t r = 0; r < product.bands(); ++r)
      for (int64_t q = 0; q < product.columns(); ++q) {
        product.tile(r, q, tile);
        A* to = rows + lane * line + r * kRows * y.count + q * W;
        for (int64_t k = 0; k < std::min(kRows, x.count - r * kRows); ++k)
          std::copy_n(tile + k * W, panel_width<A>(y.count, q), to + k * y.count);
      }
  }
  transpose_lanes<A, L>(rows, line, depth, packed);
}

// Gram matrix through J itself, made chunk by chunk of its columns.
template <class T>
void gram_of_formed(const Jacobian<T>& left, const Jacobian<T>& right, bool same, bool threads, GramOutput<T> out) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kBands = W / kRows, kTile = kRows * W, kDepth = 8192, kStep = 1024,
                    kParts = W / kLanesFormed<A>, kEnough = 64;
  const JacobianSizes &s = left.size, &z = right.size;
  const int64_t rows = s.V * s.N, cols = z.V * z.N, P = panels<A>(rows), Q = panels<A>(cols);
  const bool swapped = inputs_as_rows<T>(left, s.O, s.I);
  const int64_t split = P * Q < kEnough ? kBands : 1;
  const int64_t height = std::min(s.O, kDepth / W), wide = std::max<int64_t>(1, kDepth / (height * W)) * W;
  Buffer<A> x(P * height * std::min(s.I, wide) * W), y(same ? 0 : Q * height * std::min(s.I, wide) * W),
      sums(P * Q * kBands * kTile);
  const auto product = tile_product<A>();
  for (int64_t o0 = 0; o0 < s.O; o0 += height)
    for (int64_t i0 = 0; i0 < s.I; i0 += wide) {
      const int64_t h = std::min(height, s.O - o0), w = std::min(wide, s.I - i0), depth = h * w;
      share_tasks((P + (same ? 0 : Q)) * kParts, threads, [&](int64_t task) {
        const int64_t k = task / kParts, lane = task % kParts * kLanesFormed<A>;
        k < P ? form_lanes<T>(left, k * W + lane, o0, h, i0, w, swapped, x + k * depth * W + lane)
              : form_lanes<T>(right, (k - P) * W + lane, o0, h, i0, w, swapped, y + (k - P) * depth * W + lane);
      });
      const A* other = same ? x : y;
      share_tasks(P * Q * split, threads, [&](int64_t task) {
        const int64_t k = task / split, p = k / Q, q = k % Q, left_rows = rows - p * W;
        if (same && p > q) return;
        const int64_t first = task % split * kBands / split, last = (task % split + 1) * kBands / split;
        for (int64_t k0 = 0; k0 < depth; k0 += kStep)
          for (int64_t band = first; band < last && band * kRows < left_rows; ++band) {
            const int64_t skip = same && p == q && 2 * band >= kBands ? W / 2 : 0;  // left of the diagonal
            product(x + (p * depth + k0) * W + band * kRows, W, other + (q * depth + k0) * W + skip, W,
                    {std::min(kStep, depth - k0)}, sums + (k * kBands + band) * kTile + skip,
                    std::min(kRows, left_rows - band * kRows), panel_width<A>(cols, q) - skip, o0 + i0 + k0 > 0);
          }
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
