// X[n, (o, i, p)] = m[n, o, p] a[n, i] + g[n, o] d[n, i, p] for a block between two layers (two_layers.h): its operands
// packed, and formed from them.
//
// Entries (p, i) fill panels of kCols lanes: as many i as fit side by side, for as many p as fit. The operands of a run
// of outputs and panels are laid out along the samples first, so that forming X reads them in order: 4 flops and one
// store an entry. Of a d that is diagonal (only i = p) one lane an output p is touched.
#pragma once
#include "../places.h"
#include "kernel.h"
#include "tile_product.h"

#include <vector>

namespace torch_curvature::cpu {

template <class T>
struct TwoLayers {
  const T *m, *a, *a2, *g, *d;
  int64_t mn, mo, mp, an, ai, a2n, a2j, gn, go, dn, di, dp;
  BlockSizes size;
  T* out;
  int64_t ld;
  bool add;
};

// Inputs [i0, i0 + inputs) by `outputs` outputs p in every panel: lane (p - p0) inputs + i - i0.
struct LaneTile {
  int64_t i0, inputs, outputs;
};

// Inputs in pieces that leave at most a quarter of the lanes empty.
inline std::vector<LaneTile> lane_tiles(int64_t I, int64_t W) {
  std::vector<LaneTile> tiles;
  for (int64_t i = 0; i < I;) {
    int64_t inputs = std::min(W, I - i);
    while (4 * inputs * (W / inputs) < 3 * W) --inputs;
    tiles.push_back({i, inputs, W / inputs});
    i += inputs;
  }
  return tiles;
}

// a of a tile's inputs in every lane: x [N][kCols], zero where there is none.
template <class T, class A>
CURVATURE_CLONES void pack_lanes(const TwoLayers<T>& s, LaneTile t, A* __restrict__ x) {
  constexpr int64_t W = kCols<A>;
  for (int64_t n = 0; n < s.size.N; ++n, x += W) {
    const T* a = s.a + n * s.an + t.i0 * s.ai;
    for (int64_t i = 0; i < t.inputs; ++i) x[i] = static_cast<A>(a[i * s.ai]);
    for (int64_t c = t.inputs; c < W; ++c) x[c] = c < t.inputs * t.outputs ? x[c - t.inputs] : A(0);
  }
}

constexpr int64_t kOutputs = 16;  // outputs o of a task
constexpr int64_t kLanes = 8;     // panels of a task
template <class A>  // of d for these panels, one sample's row: not a power of two, or few lines of the cache would do
constexpr int64_t kMoved = kLanes * kCols<A> + 64 / sizeof(A);

// d of outputs [p0, p1) and a tile's inputs, in the lanes of their panels: y [N][kMoved].
template <class T, class A>
CURVATURE_CLONES void pack_moved(const TwoLayers<T>& s, LaneTile t, int64_t p0, int64_t p1, A* __restrict__ y) {
  constexpr int64_t W = kCols<A>, kAhead = 8;
  const int64_t with = std::clamp<int64_t>(s.size.D - t.i0, 0, t.inputs), N = s.size.N;
  if (with < t.inputs || t.inputs * t.outputs < W || p1 - p0 < kLanes * t.outputs)
    std::fill(y, y + N * kMoved<A>, A(0));
  if (s.dn == 1) {
    for (int64_t p = 0; p < p1 - p0; ++p)
      transpose_all<T, A>(s.d + t.i0 * s.di + (p0 + p) * s.dp, s.di, with, N,
                          y + p / t.outputs * W + p % t.outputs * t.inputs, kMoved<A>);
    return;
  }
  for (int64_t n = 0; n < N; ++n, y += kMoved<A>) {
    const T* d = s.d + n * s.dn + t.i0 * s.di + p0 * s.dp;
    if (n + kAhead < N)
      for (int64_t i = 0; i < with; ++i) __builtin_prefetch(d + kAhead * s.dn + i * s.di);
    if (t.outputs == 1 && s.dp == 1) transpose_all<T, A>(d, s.di, with, p1 - p0, y, W);
    else
      for (int64_t p = 0; p < p1 - p0; ++p)
        for (int64_t i = 0; i < with; ++i)
          y[p / t.outputs * W + p % t.outputs * t.inputs + i] = static_cast<A>(d[i * s.di + p * s.dp]);
  }
}

// m of outputs [o0, o1) and [p0, p1): w [p][o][N].
template <class T, class A>
CURVATURE_CLONES void pack_seconds(const TwoLayers<T>& s, int64_t o0, int64_t o1, int64_t p0, int64_t p1,
                                   A* __restrict__ w) {
  const int64_t N = s.size.N, apart = (o1 - o0) * N;
  for (int64_t o = o0; o < o1; ++o, w += N) {
    const T* m = s.m + o * s.mo + p0 * s.mp;
    if (s.mp == 1) transpose_all<T, A>(m, s.mn, N, p1 - p0, w, apart);
    else
      for (int64_t p = 0; p < p1 - p0; ++p)
        for (int64_t n = 0; n < N; ++n) w[p * apart + n] = static_cast<A>(m[n * s.mn + p * s.mp]);
  }
}

// The diagonal of d for outputs [p0, p1): y [p][N].
template <class T, class A>
CURVATURE_CLONES void pack_diagonal(const TwoLayers<T>& s, int64_t p0, int64_t p1, A* __restrict__ y) {
  for (int64_t p = p0; p < p1; ++p, y += s.size.N)
    for (int64_t n = 0; n < s.size.N; ++n) y[n] = static_cast<A>(s.d[n * s.dn + p * s.dp]);
}

// X += g d where i = p, for a lane.
template <class A>
CURVATURE_CLONES void add_diagonal(const A* __restrict__ g, const A* __restrict__ y, int64_t count,
                                   A* __restrict__ lane) {
  for (int64_t k = 0; k < count; ++k) lane[k * kCols<A>] += g[k] * y[k];
}

// g of outputs [o0, o1): to [o][N].
template <class T, class A>
CURVATURE_CLONES void pack_slopes(const TwoLayers<T>& s, int64_t o0, int64_t o1, A* __restrict__ to) {
  const T* g = s.g + o0 * s.go;
  if (s.go == 1) return transpose_all<T, A>(g, s.gn, s.size.N, o1 - o0, to, s.size.N);
  for (int64_t o = 0; o < o1 - o0; ++o)
    for (int64_t n = 0; n < s.size.N; ++n) to[o * s.size.N + n] = static_cast<A>(g[n * s.gn + o * s.go]);
}

// X of one output o and a panel, for `count` samples: to [count][kCols]. w: m, outputs p `apart`; y may be absent.
// `inputs` is I where that is not 0.
template <class A, int64_t I>
CURVATURE_INLINE void form_lanes(const A* w, int64_t apart, const A* g, const A* __restrict__ x,
                                 const A* __restrict__ y, int64_t count, int64_t inputs, int64_t outputs,
                                 A* __restrict__ to) {
  constexpr int64_t W = kCols<A>;
  const int64_t width = I > 0 ? I : inputs;
  if (outputs * width < W) std::fill(to, to + count * W, A(0));
  for (int64_t k = 0; k < count; ++k, x += W, to += W)
    for (int64_t p = 0; p < outputs; ++p) {
      const A own = w[p * apart + k];
      if (y) {
        const A slope = g[k], *moved = y + k * kMoved<A>;
        for (int64_t c = p * width; c < (p + 1) * width; ++c) to[c] = own * x[c] + slope * moved[c];
      } else {
        for (int64_t c = p * width; c < (p + 1) * width; ++c) to[c] = own * x[c];
      }
    }
}

template <class A>
CURVATURE_CLONES void form_panel(const A* w, int64_t apart, const A* g, const A* x, const A* y, int64_t count,
                                 int64_t inputs, int64_t outputs, A* to) {
  constexpr int64_t W = kCols<A>;
  if (inputs == W) form_lanes<A, W>(w, apart, g, x, y, count, W, 1, to);
  else if (inputs == W / 2) form_lanes<A, W / 2>(w, apart, g, x, y, count, W / 2, outputs, to);
  else form_lanes<A, 0>(w, apart, g, x, y, count, inputs, outputs, to);
}

// The same where lanes are outputs p of one input, of which m has its values side by side.
template <class T, class A>
CURVATURE_CLONES void form_outputs(const T* m, int64_t mn, int64_t mp, const A* g, const A* __restrict__ x,
                                   const A* __restrict__ y, int64_t count, int64_t outputs, A* __restrict__ to) {
  constexpr int64_t W = kCols<A>;
  if (outputs < W) std::fill(to, to + count * W, A(0));
  if (mn == 1) transpose_all<T, A>(m, mp, outputs, count, to, W);
  for (int64_t k = 0; k < count; ++k, x += W, to += W, m += mn) {
    if (mn == 1)
      for (int64_t c = 0; c < outputs; ++c) to[c] *= x[c];
    else if (mp == 1)
      for (int64_t c = 0; c < outputs; ++c) to[c] = static_cast<A>(m[c]) * x[c];
    else
      for (int64_t c = 0; c < outputs; ++c) to[c] = static_cast<A>(m[c * mp]) * x[c];
    if (y)
      for (int64_t c = 0; c < outputs; ++c) to[c] += g[k] * y[k * kMoved<A> + c];
  }
}
}  // namespace torch_curvature::cpu
