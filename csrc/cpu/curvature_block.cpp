// curvature_block: a block between the parameters of two layers, added to or written into its places of a symmetric
// matrix.
//
//   value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j]
//   out[row(o, i), column(p, j)] (+)= value,   out[column(p, j), row(o, i)] (+)= value
//
// Shapes: m [N, O, O2], a [N, I], a2 [N, I2], g [N, O], d [N, D, O2] (zero for inputs i >= D), out [P, P]. Second
// derivatives of a loss by the weights of z = W a, given those by the z: m by both, d = da / dz2, g by z alone.
//
// One matrix product over samples of X[n, (o, i, p)] = m a + g d by a2: 2 N O I O2 I2 flops. A task takes 16 inputs i
// by a few outputs p, packs their d once, and for one o after the other forms X in the second-level cache, multiplies
// it by the packed a2, and writes the products, 16 x 16 at a time, to both their places. Bytes: out twice (once where
// nothing is added), m once for every 16 inputs, d once for every `kOutputs` outputs o.
//
// Without a2 it is the block of one layer with itself: only the pairs o <= p and i <= j are multiplied
// (kronecker_core.h).
#include "kronecker_core.h"

namespace torch_curvature::cpu {
namespace {

constexpr int64_t kLanes = 128;   // entries (p, i) of a task
constexpr int64_t kOutputs = 16;  // outputs o of a task
constexpr int64_t kAhead = 12;  // samples that are fetched ahead: their strides are too large for the hardware to guess

template <class T>
struct TwoLayers {
  const T *m, *a, *a2, *g, *d;
  int64_t mn, mo, mp, an, ai, a2n, a2j, gn, go, dn, di, dp;
  BlockSizes size;
  T* out;
  int64_t ld;
  bool add;
};

// Entries (p, i) of X that one task forms: lane (p - p0) (i1 - i0) + i - i0.
struct LaneTile {
  int64_t i0, i1, p0, p1;
  int64_t inputs() const { return i1 - i0; }
  int64_t lanes() const { return (p1 - p0) * (i1 - i0); }
};

inline std::vector<LaneTile> lane_tiles(int64_t I, int64_t O2) {
  std::vector<LaneTile> tiles;
  for (int64_t i = 0; i < I; i += kEdge) {
    const int64_t i1 = std::min(I, i + kEdge), step = kLanes / (i1 - i);
    for (int64_t p = 0; p < O2; p += step) tiles.push_back({i, i1, p, std::min(O2, p + step)});
  }
  return tiles;
}

// Samples n0.. of a and d for a tile: left [count][kEdge], moved [count][lanes].
template <class T, class A>
CURVATURE_CLONES void pack_inputs(const TwoLayers<T>& s, LaneTile t, int64_t n0, int64_t count, A* __restrict__ left,
                                  A* __restrict__ moved) {
  const int64_t inputs = t.inputs(), with = std::clamp<int64_t>(s.size.D - t.i0, 0, inputs);
  for (int64_t k = 0; k < count; ++k) {
    const T* a = s.a + (n0 + k) * s.an + t.i0 * s.ai;
    for (int64_t i = 0; i < inputs; ++i) left[k * kEdge + i] = static_cast<A>(a[i * s.ai]);
    if (!s.d) continue;
    const T* d = s.d + (n0 + k) * s.dn + t.i0 * s.di + t.p0 * s.dp;
    if (k + kAhead < count)
      for (int64_t i = 0; i < with; ++i) __builtin_prefetch(d + kAhead * s.dn + i * s.di);
    A* to = moved + k * t.lanes();
    for (int64_t i = 0; i < with; ++i)
      for (int64_t p = 0; p < t.p1 - t.p0; ++p) to[p * inputs + i] = static_cast<A>(d[i * s.di + p * s.dp]);
    for (int64_t i = with; i < inputs; ++i)
      for (int64_t p = 0; p < t.p1 - t.p0; ++p) to[p * inputs + i] = A(0);
  }
}

// Asks for m of output o at `count` samples from n on, below `end`, while something else is computed.
template <class T>
CURVATURE_INLINE void fetch_second_derivatives(const TwoLayers<T>& s, LaneTile t, int64_t o, int64_t n, int64_t count,
                                               int64_t end) {
  for (const int64_t stop = std::min(end, n + count); n < stop; ++n) {
    const T* m = s.m + n * s.mn + o * s.mo + t.p0 * s.mp;
    __builtin_prefetch(m, 0, 2);
    __builtin_prefetch(m + (t.p1 - 1 - t.p0) * s.mp, 0, 2);
  }
}

// X of one output o: panels [lanes / kCols][count][kCols].
template <class T, class A>
CURVATURE_CLONES void form_panels(const TwoLayers<T>& s, LaneTile t, int64_t o, int64_t n0, int64_t count,
                                  const A* __restrict__ left, const A* __restrict__ moved, A* __restrict__ panels) {
  constexpr int64_t W = kCols<A>;
  const int64_t inputs = t.inputs(), outputs = t.p1 - t.p0, lanes = t.lanes();
  A row[kLanes];
  for (int64_t k = 0; k < count; ++k) {
    const T* m = s.m + (n0 + k) * s.mn + o * s.mo + t.p0 * s.mp;
    const A* x = left + k * kEdge;
    const A* y = moved + k * lanes;
    const A g = s.d ? static_cast<A>(s.g[(n0 + k) * s.gn + o * s.go]) : A(0);
    if (k + kAhead < count) {
      __builtin_prefetch(m + kAhead * s.mn);
      __builtin_prefetch(m + kAhead * s.mn + (outputs - 1) * s.mp);
    }
    if (inputs == kEdge) {
      A* to = panels + k * W;
      for (int64_t p = 0; p < outputs; p += W / kEdge, to += count * W)
        for (int64_t q = 0; q < std::min(W / kEdge, outputs - p); ++q) {
          const A w = static_cast<A>(m[(p + q) * s.mp]);
          const A* z = y + (p + q) * kEdge;
          if (s.d)
#pragma GCC unroll 1
            for (int64_t i = 0; i < kEdge; ++i) to[q * kEdge + i] = w * x[i] + g * z[i];
          else
#pragma GCC unroll 1
            for (int64_t i = 0; i < kEdge; ++i) to[q * kEdge + i] = w * x[i];
        }
      continue;
    }
    if (inputs == 1 && s.mp == 1)
      for (int64_t p = 0; p < outputs; ++p) row[p] = static_cast<A>(m[p]) * x[0];
    else
      for (int64_t p = 0; p < outputs; ++p) {
        const A w = static_cast<A>(m[p * s.mp]);
        for (int64_t i = 0; i < inputs; ++i) row[p * inputs + i] = w * x[i];
      }
    if (s.d)
      for (int64_t c = 0; c < lanes; ++c) row[c] += g * y[c];
    for (int64_t q = 0; q * W < lanes; ++q)
      std::memcpy(panels + (q * count + k) * W, row + q * W, std::min(W, lanes - q * W) * sizeof(A));
  }
}

// The products of one output o with a tile, [I2 / kRows][lanes / kCols][kRows][kCols], to both their places.
template <class T, class A>
CURVATURE_CLONES void place_products(const TwoLayers<T>& s, LaneTile t, int64_t o, const A* products) {
  constexpr int64_t W = kCols<A>;
  const BlockSizes& z = s.size;
  const int64_t inputs = t.inputs(), wide = divide_up(t.lanes(), W);
  T tile[kEdge][kEdge], flipped[kEdge][kEdge];  // [i][j] and [j][i]
  const PlacedRun rows{z.rows, o, t.i0, inputs, z.I};
  for (int64_t p = t.p0; p < t.p1; ++p)
    for (int64_t j0 = 0; j0 < z.I2; j0 += kEdge) {
      const int64_t height = std::min(kEdge, z.I2 - j0), lane = (p - t.p0) * inputs;
      for (int64_t j = 0; j < height; ++j) {
        const A* panel = products + (j0 + j) / kRows * wide * kRows * W + (j0 + j) % kRows * W;
        if (inputs == kEdge)
          for (int64_t i = 0; i < kEdge; ++i)
            flipped[j][i] = static_cast<T>(panel[lane / W * kRows * W + lane % W + i]);
        else
          for (int64_t i = 0; i < inputs; ++i)
            flipped[j][i] = static_cast<T>(panel[(lane + i) / W * kRows * W + (lane + i) % W]);
      }
      transpose_tile<T>(flipped, tile);
      const PlacedRun columns{z.columns, p, j0, height, z.I2};
      const int64_t j1 = j0 + kEdge < z.I2 ? j0 + kEdge : 0, p1 = p + (j1 == 0);
      if (p1 < t.p1) {
        const PlacedRun next{z.columns, p1, j1, std::min(kEdge, z.I2 - j1), z.I2};
        fetch_places(rows, next, s.out, s.ld);
        fetch_places(next, rows, s.out, s.ld);
      }
      place_tile(tile, rows, columns, s.out, s.ld, s.add);
      place_tile(flipped, columns, rows, s.out, s.ld, s.add);
    }
}

template <class T>
void two_layers(const TwoLayers<T>& s) {
  using A = accumulate_t<T>;
  constexpr int64_t W = kCols<A>, kTile = kRows * W, kDepth = 2048 / sizeof(A);
  const BlockSizes& z = s.size;
  const int64_t depth = std::min(z.N, kDepth), chunks = divide_up(z.N, kDepth), heights = divide_up(z.I2, kRows);
  const bool threads = double(z.N) * z.O * z.I * z.O2 * z.I2 > kWorthThreads;
  const auto product = tile_product<A>();
  Buffer<A> right(heights * z.N * kRows);  // a2 as panels [heights][N][kRows]
  share_tasks(heights, double(z.N) * z.I2 > kWorthThreads, [&](int64_t h) {
    A* to = right + h * z.N * kRows;
    for (int64_t n = 0; n < z.N; ++n)
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t j = h * kRows + r;
        to[n * kRows + r] = j < z.I2 ? static_cast<A>(s.a2[n * s.a2n + j * s.a2j]) : A(0);
      }
  });
  const std::vector<LaneTile> tiles = lane_tiles(z.I, z.O2);
  const int64_t runs = divide_up(z.O, kOutputs);
  share_tasks(static_cast<int64_t>(tiles.size()) * runs, threads, [&](int64_t task) {
    const LaneTile t = tiles[task / runs];
    const int64_t o0 = task % runs * kOutputs, o1 = std::min(z.O, o0 + kOutputs), lanes = t.lanes();
    const int64_t wide = divide_up(lanes, W), each = heights * wide * kTile;
    Buffer<A> left(depth * kEdge), moved(depth * lanes), panels(wide * depth * W),
        sums(each * (chunks > 1 ? o1 - o0 : 1));
    if (lanes % W) std::fill(panels + (wide - 1) * depth * W, panels + wide * depth * W, A(0));
    for (int64_t n0 = 0; n0 < z.N; n0 += kDepth) {
      const int64_t count = std::min(kDepth, z.N - n0);
      pack_inputs<T, A>(s, t, n0, count, left, moved);
      for (int64_t o = o0; o < o1; ++o) {
        A* c = sums + (chunks > 1 ? (o - o0) * each : 0);
        form_panels<T, A>(s, t, o, n0, count, left, moved, panels);
        const int64_t share = divide_up(count, wide * heights);
        for (int64_t q = 0; q < wide; ++q)
          for (int64_t h = 0; h < heights; ++h) {
            if (o + 1 < o1) fetch_second_derivatives(s, t, o + 1, n0 + (q * heights + h) * share, share, n0 + count);
            product(right + (h * z.N + n0) * kRows, kRows, panels + q * count * W, W, {count},
                    c + (h * wide + q) * kTile, std::min(kRows, z.I2 - h * kRows), std::min(W, lanes - q * W), n0 > 0);
          }
        if (n0 + count == z.N) place_products<T, A>(s, t, o, c);
      }
    }
  });
}

// A layer with itself that has one input, a bias: sums over the samples, m[n, o, p] a[n]^2 for p >= o.
template <class T, class A>
CURVATURE_CLONES void sum_samples(const T* m, int64_t mn, int64_t mp, const T* a, int64_t an, int64_t N, int64_t count,
                                  A* __restrict__ sum) {
  std::fill_n(sum, count, A(0));
  for (int64_t n = 0; n < N; ++n) {
    const A weight = static_cast<A>(a[n * an]) * static_cast<A>(a[n * an]);
    const T* row = m + n * mn;
    if (mp == 1)
      for (int64_t p = 0; p < count; ++p) sum[p] += weight * static_cast<A>(row[p]);
    else
      for (int64_t p = 0; p < count; ++p) sum[p] += weight * static_cast<A>(row[p * mp]);
  }
}

template <class T>
void one_input(const TwoLayers<T>& s) {
  using A = accumulate_t<T>;
  const BlockSizes& z = s.size;
  share_tasks(z.O, double(z.N) * z.O * z.O > kWorthThreads, [&](int64_t o) {
    Buffer<A> sum(z.O - o);
    sum_samples<T, A>(s.m + o * (s.mo + s.mp), s.mn, s.mp, s.a, s.an, z.N, z.O - o, sum);
    for (int64_t p = o; p < z.O; ++p) {
      const int64_t row = z.rows.at(o, 0, 1), column = z.rows.at(p, 0, 1);
      T &to = s.out[row * s.ld + column], &twin = s.out[column * s.ld + row];
      to = twin = static_cast<T>(s.add ? A(to) + sum[p - o] : sum[p - o]);
    }
  });
}

// No samples: zeros, or nothing to add.
void write_zeros(const BlockSizes& z, bool symmetric, Tensor& out) {
  const int64_t ld = out.stride(0);
  dispatch_floating(out.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(out.data_ptr());
    for (int64_t o = 0; o < z.O; ++o)
      for (int64_t i = 0; i < z.I; ++i)
        for (int64_t p = 0; p < z.O2; ++p)
          for (int64_t j = 0; j < z.I2; ++j) {
            const int64_t row = z.rows.at(o, i, z.I), column = (symmetric ? z.rows : z.columns).at(p, j, z.I2);
            to[row * ld + column] = to[column * ld + row] = T(0);
          }
  });
}

void curvature_block(const Tensor& m, const Tensor& a, std::optional<Tensor> a2, std::optional<Tensor> g,
                     std::optional<Tensor> d, std::vector<int64_t> rows, std::vector<int64_t> columns, bool add,
                     Tensor out) {
  const BlockSizes z = check_curvature_block(m, a, a2, g, d, rows, columns, out);
  if (z.O * z.I * z.O2 * z.I2 == 0) return;
  if (z.N == 0) {
    if (!add) write_zeros(z, !a2, out);
    return;
  }
  const auto sm = strided<3>(m, {}), sd = strided<3>(d && z.D ? *d : m, {});
  const auto sa = strided<2>(a, {}), sa2 = strided<2>(a2 ? *a2 : a, {}), sg = strided<2>(g ? *g : a, {});
  dispatch_floating(m.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const T* values = sm.template data<T>();
    T* to = static_cast<T*>(out.data_ptr());
    const bool moves = g && z.D;
    if (a2 || z.I == 1) {
      (a2 ? two_layers<T> : one_input<T>)({values,
                                           sa.template data<T>(),
                                           sa2.template data<T>(),
                                           moves ? sg.template data<T>() : nullptr,
                                           moves ? sd.template data<T>() : nullptr,
                                           sm.core[0],
                                           sm.core[1],
                                           sm.core[2],
                                           sa.core[0],
                                           sa.core[1],
                                           sa2.core[0],
                                           sa2.core[1],
                                           sg.core[0],
                                           sg.core[1],
                                           sd.core[0],
                                           sd.core[1],
                                           sd.core[2],
                                           z,
                                           to,
                                           out.stride(0),
                                           add});
      return;
    }
    const T* own = sa.template data<T>();
    const KroneckerProblem<T> problem{own,  own, sa.core[0], sa.core[1], sa.core[0],    sa.core[1],
                                      z.N,  z.O, z.O2,       z.I,        z.I2,          true,
                                      true, to,  z.rows,     z.rows,     out.stride(0), add};
    kronecker<T>(problem, [&](const Pair* pairs, int64_t count, int64_t n, A* x) {
      const T* from = values + n * sm.core[0];
      for (int64_t c = 0; c < count; ++c)
        x[c] = static_cast<A>(from[pairs[c].o * sm.core[1] + pairs[c].p * sm.core[2]]);
    });
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_curvature, CPU, m) { m.impl("curvature_block", TORCH_BOX(&curvature_block)); }
}  // namespace torch_curvature::cpu
