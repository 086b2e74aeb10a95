// A block between two layers: value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j], written
// to both its places.
//
// One matrix product over samples of X[n, (o, i, p)] = m a + g d by a2: 2 N O I O2 I2 flops. Entries (p, i) of X fill
// panels of kCols lanes (lanes.h). A task takes a few outputs o by a few panels, packs a and d of its lanes once, and
// for one o after the other forms X of `kChunk` samples in the first cache and multiplies it by the packed a2. While it
// does so, the products of the panel before go to their places. Bytes: out twice (once where nothing is added), m once
// for every tile of inputs i, d once for every `kOutputs` outputs o.
#pragma once
#include "lanes.h"
#include "placed.h"

namespace torch_curvature::cpu {

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
  static constexpr int64_t W = kCols<A>, kChunk = 256 / sizeof(A), kBlock = 4096 / sizeof(A);

 public:
  // right: a2 as panels [tall][N][each].
  TwoLayersWorker(const TwoLayers<T>& s, const A* right, int64_t each)
      : s_(s),
        right_(right),
        each_(each),
        tall_(divide_up(s.size.I2, each)),
        rows_(divide_up(s.size.I2, 4) * 4 + 4),
        bounds_(input_ranges(s.size.I2)),
        x_(std::min(s.size.N, kBlock) * W),
        y_(s.d ? std::min(s.size.N, kBlock) * kMoved<A> : 0),
        w_(kOutputs * std::min(s.size.N, kBlock) * std::min(s.size.O2, kLanes * W)),
        g_(s.d ? kOutputs * std::min(s.size.N, kBlock) : 0),
        panel_(kChunk * W),
        sums_(2 * kOutputs * rows_ * W),
        now_(sums_),
        before_(sums_ + kOutputs * rows_ * W) {}

  // Outputs [o0, o1) by panels [q0, q1) of a tile; of many samples block by block for one panel after the other.
  void operator()(LaneTile t, int64_t o0, int64_t o1, int64_t q0, int64_t q1) {
    const int64_t N = s_.size.N, step = N <= kBlock ? q1 - q0 : 1;
    for (int64_t q = q0; q < q1; q += step)
      for (int64_t n = 0; n < N; n += kBlock) {
        TwoLayers<T> block = s_;
        block.size.N = std::min(kBlock, N - n);
        block.m += n * s_.mn, block.a += n * s_.an;
        if (s_.d) block.g += n * s_.gn, block.d += n * s_.dn;
        add_block(block, n, t, o0, o1, q, std::min(q1, q + step));
      }
  }

  void finish() { proceed(1, 1); }

 private:
  // The samples of a block, from `first` on; after the last the panels' products wait for their places.
  void add_block(const TwoLayers<T>& s, int64_t first, LaneTile t, int64_t o0, int64_t o1, int64_t q0, int64_t q1) {
    const BlockSizes& z = s.size;
    const int64_t p0 = q0 * t.outputs, p1 = std::min(z.O2, q1 * t.outputs);
    pack_lanes<T, A>(s, t, x_);
    if (t.inputs > 1) pack_seconds<T, A>(s, o0, o1, p0, p1, w_);
    if (s.d) {
      if (z.diagonal) pack_diagonal<T, A>(s, p0, p1, y_);
      else pack_moved<T, A>(s, t, p0, p1, y_);
      pack_slopes<T, A>(s, o0, o1, g_);
    }
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t p = q * t.outputs, outputs = std::min(z.O2 - p, t.outputs);
      multiply(s, first, t, o0, o1 - o0, p, outputs, w_ + (p - p0) * (o1 - o0) * z.N,
               !s.d         ? nullptr
               : z.diagonal ? y_ + (p - p0) * z.N
                            : y_ + (q - q0) * W);
      if (first + z.N < s_.size.N) continue;
      std::swap(now_, before_);
      o0_ = o0, outputs_ = o1 - o0, p0_ = p, piece_ = 0;
      next_ = {o0, p, t.i0, t.inputs, 0, bounds_[1]};
      waiting_.begin(outputs_ * outputs * static_cast<int64_t>(bounds_.size() - 1),
                     [&](int64_t, int64_t part) { fetch_products(s_, next_, part); });
    }
  }

  // `count` outputs o by one panel.
  void multiply(const TwoLayers<T>& s, int64_t first, LaneTile t, int64_t o0, int64_t count, int64_t p0,
                int64_t outputs, const A* w, const A* y) {
    const int64_t N = s.size.N, calls = divide_up(N, kChunk) * count;
    const auto product = tall_product<A>();
    int64_t done = 0;
    for (int64_t n = 0; n < N; n += kChunk) {
      const int64_t depth = std::min(kChunk, N - n);
      for (int64_t o = 0; o < count; ++o) {
        const A *x = x_ + n * W, *moved = y && !s.size.diagonal ? y + n * kMoved<A> : nullptr,
                *g = g_ + (y ? o * N + n : 0);
        if (t.inputs > 1) form_panel<A>(w + o * N + n, count * N, g, x, moved, depth, t.inputs, outputs, panel_);
        else
          form_outputs<T, A>(s.m + n * s.mn + (o0 + o) * s.mo + p0 * s.mp, s.mn, s.mp, g, x, moved, depth, outputs,
                             panel_);
        if (y && s.size.diagonal)
          for (int64_t p = std::max(p0, t.i0); p < std::min(p0 + outputs, t.i0 + t.inputs); ++p)
            add_diagonal<A>(g, y + (p - p0) * N + n, depth, panel_ + (p - p0) * t.inputs + p - t.i0);
        for (int64_t h = 0; h < tall_; ++h)
          product(right_ + (h * s_.size.N + first + n) * each_, each_, panel_, W, depth,
                  now_ + (o * rows_ + h * each_) * W, std::min(each_, s.size.I2 - h * each_), first + n > 0);
        proceed(++done, calls);
      }
    }
  }

  // The next of what waits: all o of one p after the other, whose places are side by side.
  void advance() {
    if (++next_.o < o0_ + outputs_) return;
    next_.o = o0_;
    if (++piece_ == static_cast<int64_t>(bounds_.size()) - 1) piece_ = 0, ++next_.p;
    next_.j0 = bounds_[piece_], next_.height = bounds_[piece_ + 1] - bounds_[piece_];
  }

  void proceed(int64_t done, int64_t of) {
    waiting_.proceed(
        done, of,
        [&](int64_t) {
          place_products<T, A>(s_, next_,
                               before_ + ((next_.o - o0_) * rows_ + next_.j0) * W + (next_.p - p0_) * next_.inputs);
          advance();
        },
        [&](int64_t, int64_t part) { fetch_products(s_, next_, part); });
  }

  const TwoLayers<T>& s_;
  const A* right_;
  const int64_t each_, tall_, rows_;
  const std::vector<int64_t> bounds_;
  Buffer<A> x_, y_, w_, g_, panel_, sums_;
  A *now_, *before_;
  Waiting waiting_;
  PlacedProducts next_{};
  int64_t o0_ = 0, outputs_ = 0, p0_ = 0, piece_ = 0;
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
