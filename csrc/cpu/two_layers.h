// A block between two layers: value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j], written
// to both its places.
//
// One matrix product over samples of X[n, (o, i, p)] = m a + g d by a2: 2 N O I O2 I2 flops. Entries (p, i) of X fill
// panels of kCols lanes, as many i as fit side by side. A task takes a few outputs o by a few panels, packs a and d of
// its lanes once, and for one o after the other forms X of `kChunk` samples in the first cache and multiplies it by the
// packed a2. While it does so, the products of the panel before go to their places. Bytes: out twice (once where
// nothing is added), m once for every tile of inputs i, d once for every `kOutputs` outputs o.
#pragma once
#include "placed.h"

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
  for (int64_t k = 0; k < count; ++k, x += W, to += W, m += mn) {
    if (mp == 1)
      for (int64_t c = 0; c < outputs; ++c) to[c] = static_cast<A>(m[c]) * x[c];
    else
      for (int64_t c = 0; c < outputs; ++c) to[c] = static_cast<A>(m[c * mp]) * x[c];
    if (y)
      for (int64_t c = 0; c < outputs; ++c) to[c] += g[k] * y[k * kMoved<A> + c];
  }
}

// Some columns of the products of one pair (o, p): [j][lane], rows of kCols.
struct PlacedProducts {
  int64_t o, p, i0, inputs, j0, height;
};

template <class T>
CURVATURE_CLONES void fetch_products(const TwoLayers<T>& s, PlacedProducts t, int64_t part) {
  const PlacedRun rows{s.size.rows, t.o, t.i0, t.inputs, s.size.I},
      columns{s.size.columns, t.p, t.j0, t.height, s.size.I2};
  fetch_places(rows, columns, s.out, s.ld, part, Waiting::kParts);
  if (t.inputs > 1) fetch_places(columns, rows, s.out, s.ld, part, Waiting::kParts);
}

template <class T, class A>
CURVATURE_CLONES void place_products(const TwoLayers<T>& s, PlacedProducts t, const A* products) {
  constexpr int64_t W = kCols<A>;
  const PlacedRun rows{s.size.rows, t.o, t.i0, t.inputs, s.size.I},
      columns{s.size.columns, t.p, t.j0, t.height, s.size.I2};
  alignas(64) T tile[kWhole * kWhole], given[kWhole * W];  // [i][j] and, in the matrix's dtype, [j][i]
  const T* from = given;
  if constexpr (std::is_same_v<T, A>) from = products;
  else
    for (int64_t j = 0; j < t.height; ++j)
      for (int64_t i = 0; i < t.inputs; ++i) given[j * W + i] = static_cast<T>(products[j * W + i]);
  if (t.inputs == 1)
    for (int64_t j = 0; j < t.height; ++j) tile[j] = from[j * W];
  else turn_tile<T>(from, W, t.height, t.inputs, tile);
  place_tile<T>(tile, kWhole, rows, columns, s.out, s.ld, s.add);
  place_tile<T>(from, W, columns, rows, s.out, s.ld, s.add);
}

// What one thread does: tasks, and the places of the last panel's products.
template <class T>
class TwoLayersWorker {
  using A = accumulate_t<T>;
  static constexpr int64_t W = kCols<A>, kChunk = 256 / sizeof(A);

 public:
  // right: a2 as panels [tall][N][each].
  TwoLayersWorker(const TwoLayers<T>& s, const A* right, int64_t each)
      : s_(s),
        right_(right),
        each_(each),
        tall_(divide_up(s.size.I2, each)),
        rows_(divide_up(s.size.I2, 4) * 4 + 4),
        bounds_(input_ranges(s.size.I2)),
        x_(s.size.N * W),
        y_(s.d ? s.size.N * kMoved<A> : 0),
        w_(kOutputs * s.size.N * std::min(s.size.O2, kLanes * W)),
        g_(s.d ? kOutputs * s.size.N : 0),
        panel_(kChunk * W),
        sums_(2 * kOutputs * rows_ * W),
        now_(sums_),
        before_(sums_ + kOutputs * rows_ * W) {}

  // Outputs [o0, o1) by panels [q0, q1) of a tile.
  void operator()(LaneTile t, int64_t o0, int64_t o1, int64_t q0, int64_t q1) {
    const BlockSizes& z = s_.size;
    const int64_t p0 = q0 * t.outputs, p1 = std::min(z.O2, q1 * t.outputs);
    pack_lanes<T, A>(s_, t, x_);
    if (t.inputs > 1) pack_seconds<T, A>(s_, o0, o1, p0, p1, w_);
    if (s_.d) {
      pack_moved<T, A>(s_, t, p0, p1, y_);
      pack_slopes<T, A>(s_, o0, o1, g_);
    }
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t p = q * t.outputs, outputs = std::min(z.O2 - p, t.outputs);
      multiply(t, o0, o1 - o0, p, outputs, w_ + (p - p0) * (o1 - o0) * z.N, s_.d ? y_ + (q - q0) * W : nullptr);
      std::swap(now_, before_);
      tile_ = t, o0_ = o0, outputs_ = o1 - o0, p0_ = p;
      const int64_t each = outputs * static_cast<int64_t>(bounds_.size() - 1);
      waiting_.begin(outputs_ * each, [&](int64_t k, int64_t part) { fetch_products(s_, waiting(k), part); });
    }
  }

  void finish() { proceed(1, 1); }

 private:
  // `count` outputs o by one panel.
  void multiply(LaneTile t, int64_t o0, int64_t count, int64_t p0, int64_t outputs, const A* w, const A* y) {
    const int64_t N = s_.size.N, calls = divide_up(N, kChunk) * count * tall_;
    const auto product = tall_product<A>();
    int64_t done = 0;
    for (int64_t n = 0; n < N; n += kChunk) {
      const int64_t depth = std::min(kChunk, N - n);
      for (int64_t o = 0; o < count; ++o) {
        const A *x = x_ + n * W, *moved = y ? y + n * kMoved<A> : nullptr, *g = g_ + (y ? o * N + n : 0);
        if (t.inputs > 1) form_panel<A>(w + o * N + n, count * N, g, x, moved, depth, t.inputs, outputs, panel_);
        else
          form_outputs<T, A>(s_.m + n * s_.mn + (o0 + o) * s_.mo + p0 * s_.mp, s_.mn, s_.mp, g, x, moved, depth,
                             outputs, panel_);
        for (int64_t h = 0; h < tall_; ++h) {
          product(right_ + (h * N + n) * each_, each_, panel_, W, depth, now_ + (o * rows_ + h * each_) * W,
                  std::min(each_, s_.size.I2 - h * each_), n > 0);
          proceed(++done, calls);
        }
      }
    }
  }

  // The k-th piece of what waits: all o of one p after the other, whose places are side by side.
  PlacedProducts waiting(int64_t k) const {
    const int64_t pieces = bounds_.size() - 1, piece = k / outputs_ % pieces;
    return {o0_ + k % outputs_, p0_ + k / outputs_ / pieces,        tile_.i0, tile_.inputs,
            bounds_[piece],     bounds_[piece + 1] - bounds_[piece]};
  }

  void proceed(int64_t done, int64_t of) {
    waiting_.proceed(
        done, of,
        [&](int64_t k) {
          const PlacedProducts t = waiting(k);
          place_products<T, A>(s_, t, before_ + ((t.o - o0_) * rows_ + t.j0) * W + (t.p - p0_) * t.inputs);
        },
        [&](int64_t k, int64_t part) { fetch_products(s_, waiting(k), part); });
  }

  const TwoLayers<T>& s_;
  const A* right_;
  const int64_t each_, tall_, rows_;
  const std::vector<int64_t> bounds_;
  Buffer<A> x_, y_, w_, g_, panel_, sums_;
  A *now_, *before_;
  Waiting waiting_;
  LaneTile tile_{};
  int64_t o0_ = 0, outputs_ = 1, p0_ = 0;
};

template <class T>
void two_layers(const TwoLayers<T>& s) {
  using A = accumulate_t<T>;
  const BlockSizes& z = s.size;
  const int64_t each = divide_up(z.I2, divide_up(z.I2, kTall)), tall = divide_up(z.I2, each);
  const bool threads = double(z.N) * z.O * z.I * z.O2 * z.I2 > kWorthThreads;
  Buffer<A> right(tall * z.N * each);  // a2 as panels [tall][N][each]
  share_tasks(tall, double(z.N) * z.I2 > kWorthThreads, [&](int64_t h) {
    A* to = right + h * z.N * each;
    const int64_t width = std::min(each, z.I2 - h * each);
    for (int64_t n = 0; n < z.N; ++n)
      for (int64_t r = 0; r < width; ++r) to[n * each + r] = static_cast<A>(s.a2[n * s.a2n + (h * each + r) * s.a2j]);
  });
  struct Task {
    LaneTile tile;
    int64_t o, q, panels;
  };
  std::vector<Task> tasks;
  for (const LaneTile& t : lane_tiles(z.I, kCols<A>))
    for (int64_t o = 0; o < z.O; o += kOutputs)
      for (int64_t q = 0; q < divide_up(z.O2, t.outputs); q += kLanes)
        tasks.push_back({t, o, q, divide_up(z.O2, t.outputs)});
  share_among_workers(
      tasks.size(), threads, [&] { return TwoLayersWorker<T>(s, right, each); },
      [&](TwoLayersWorker<T>& worker, int64_t k) {
        const Task& t = tasks[k];
        worker(t.tile, t.o, std::min(z.O, t.o + kOutputs), t.q, std::min(t.panels, t.q + kLanes));
      });
}
}  // namespace torch_curvature::cpu
