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
#include "work.h"

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

// The products in the matrix's dtype, turned [i][j] into `turned`; as they are, [j][i] rows of kCols, into `given`
// where the dtypes differ.
template <class T, class A>
CURVATURE_CLONES void turn_products(PlacedProducts t, const A* products, T* turned, T* given) {
  constexpr int64_t W = kCols<A>;
  const T* from = given;
  if constexpr (std::is_same_v<T, A>) from = products;
  else
    for (int64_t j = 0; j < t.height; ++j)
      for (int64_t i = 0; i < t.inputs; ++i) given[j * W + i] = static_cast<T>(products[j * W + i]);
  if (t.inputs == 1)
    for (int64_t j = 0; j < t.height; ++j) turned[j] = from[j * W];
  else turn_tile<T>(from, W, t.height, t.inputs, turned);
}

template <class T>
CURVATURE_CLONES void place_products(const TwoLayers<T>& s, PlacedProducts t, const T* turned, const T* given) {
  const PlacedRun rows{s.size.rows, t.o, t.i0, t.inputs, s.size.I},
      columns{s.size.columns, t.p, t.j0, t.height, s.size.I2};
  place_tile<T>(turned, kWhole, rows, columns, s.out, s.ld, s.add);
  place_tile<T>(given, kCols<accumulate_t<T>>, columns, rows, s.out, s.ld, s.add);
}

// Outputs from o on by panels of a tile from q on.
struct LaneTask {
  LaneTile tile;
  int64_t o, q;
};

// What one thread does: tasks, and the places of the last panel's products.
template <class T>
class TwoLayersWorker final : public Worker {
  using A = accumulate_t<T>;
  static constexpr int64_t W = kCols<A>, kChunk = 256 / sizeof(A), kBlock = 4096 / sizeof(A);

 public:
  // right: a2 as panels [tall][N][each].
  TwoLayersWorker(const TwoLayers<T>& s, const A* right, int64_t each, const std::vector<LaneTask>& tasks)
      : s_(s),
        right_(right),
        each_(each),
        tasks_(tasks),
        tall_(divide_up(s.size.I2, each)),
        rows_(divide_up(s.size.I2, 4) * 4 + 4),
        bounds_(input_ranges(s.size.I2)),
        x_(std::min(s.size.N, kBlock) * W),
        y_(s.d ? std::min(s.size.N, kBlock) * kMoved<A> : 0),
        w_(kOutputs * std::min(s.size.N, kBlock) * std::min(s.size.O2, kLanes * W)),
        g_(s.d ? kOutputs * std::min(s.size.N, kBlock) : 0),
        panel_(kChunk * W),
        sums_(2 * kOutputs * rows_ * W),
        turned_(kWhole * kWhole),
        given_(std::is_same_v<T, A> ? 0 : kWhole * W),
        now_(sums_),
        before_(sums_ + kOutputs * rows_ * W) {}

  void run(int64_t task) override {
    const LaneTask& t = tasks_[task];
    multiply(t.tile, t.o, std::min(s_.size.O, t.o + kOutputs), t.q,
             std::min(divide_up(s_.size.O2, t.tile.outputs), t.q + kLanes));
  }

  void finish() override { proceed(1, 1); }

 private:
  // Outputs [o0, o1) by panels [q0, q1) of a tile; of many samples block by block for one panel after the other.
  void multiply(LaneTile t, int64_t o0, int64_t o1, int64_t q0, int64_t q1) {
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

  // m of a task's outputs along the samples: as it is given, or packed.
  struct Seconds {
    const A* data = nullptr;
    int64_t per_o = 0, per_p = 0;
  };
  Seconds seconds(const TwoLayers<T>& s, int64_t o0, int64_t o1, int64_t p0, int64_t p1) {
    if constexpr (std::is_same_v<T, A>)
      if (s.mn == 1) return {s.m + o0 * s.mo + p0 * s.mp, s.mo, s.mp};
    pack_seconds<T, A>(s, o0, o1, p0, p1, w_);
    return {w_, s.size.N, (o1 - o0) * s.size.N};
  }

  // The samples of a block, from `first` on; after the last the panels' products wait for their places.
  void add_block(const TwoLayers<T>& s, int64_t first, LaneTile t, int64_t o0, int64_t o1, int64_t q0, int64_t q1) {
    const BlockSizes& z = s.size;
    const int64_t p0 = q0 * t.outputs, p1 = std::min(z.O2, q1 * t.outputs);
    pack_lanes<T, A>(s, t, x_);
    const Seconds w = t.inputs > 1 ? seconds(s, o0, o1, p0, p1) : Seconds{};
    if (s.d) {
      if (z.diagonal) pack_diagonal<T, A>(s, p0, p1, y_);
      else pack_moved<T, A>(s, t, p0, p1, y_);
      pack_slopes<T, A>(s, o0, o1, g_);
    }
    for (int64_t q = q0; q < q1; ++q) {
      const int64_t p = q * t.outputs, outputs = std::min(z.O2 - p, t.outputs);
      multiply_panel(s, first, t, o0, o1 - o0, p, outputs, {w.data + (p - p0) * w.per_p, w.per_o, w.per_p},
                     !s.d         ? nullptr
                     : z.diagonal ? y_ + (p - p0) * z.N
                                  : y_ + (q - q0) * W);
      if (first + z.N < s_.size.N) continue;
      std::swap(now_, before_);
      o0_ = o0, outputs_ = o1 - o0, p0_ = p, piece_ = 0;
      next_ = {o0, p, t.i0, t.inputs, 0, bounds_[1]};
      waiting_.begin(
          outputs_ * outputs * static_cast<int64_t>(bounds_.size() - 1),
          [&](int64_t, int64_t part) { fetch_products(s_, next_, part); }, [&](int64_t) { turn(); });
    }
  }

  // `count` outputs o by one panel.
  void multiply_panel(const TwoLayers<T>& s, int64_t first, LaneTile t, int64_t o0, int64_t count, int64_t p0,
                      int64_t outputs, Seconds w, const A* y) {
    const int64_t N = s.size.N, calls = divide_up(N, kChunk) * count;
    const auto product = tall_product<A>();
    int64_t done = 0;
    for (int64_t n = 0; n < N; n += kChunk) {
      const int64_t depth = std::min(kChunk, N - n);
      for (int64_t o = 0; o < count; ++o) {
        const A *x = x_ + n * W, *moved = y && !s.size.diagonal ? y + n * kMoved<A> : nullptr,
                *g = g_ + (y ? o * N + n : 0);
        if (t.inputs > 1)
          form_panel<A>(w.data + o * w.per_o + n, w.per_p, g, x, moved, depth, t.inputs, outputs, panel_);
        else
          form_outputs<T, A>(s.m + n * s.mn + (o0 + o) * s.mo + p0 * s.mp, s.mn, s.mp, g, x, moved, depth, outputs,
                             panel_);
        if (y && s.size.diagonal)
          for (int64_t p = std::max(p0, t.i0); p < std::min(p0 + outputs, t.i0 + t.inputs); ++p)
            add_diagonal<A>(g, y + (p - p0) * N + n, depth, panel_ + (p - p0) * t.inputs + p - t.i0);
        for (int64_t h = 0; h < tall_; ++h)
          product(right_ + (h * s_.size.N + first + n) * each_, each_, panel_, W, depth,
                  now_ + (o * rows_ + h * each_) * W, std::min(each_, s.size.I2 - h * each_), W, first + n > 0);
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

  const A* waiting_products() const {
    return before_ + ((next_.o - o0_) * rows_ + next_.j0) * W + (next_.p - p0_) * next_.inputs;
  }
  void turn() { turn_products<T, A>(next_, waiting_products(), turned_, given_); }
  void proceed(int64_t done, int64_t of) {
    waiting_.proceed(
        done, of,
        [&](int64_t) {
          const T* given = given_;
          if constexpr (std::is_same_v<T, A>) given = waiting_products();
          place_products<T>(s_, next_, turned_, given);
          advance();
        },
        [&](int64_t, int64_t part) { fetch_products(s_, next_, part); }, [&](int64_t) { turn(); });
  }

  const TwoLayers<T>& s_;
  const A* right_;
  const int64_t each_;
  const std::vector<LaneTask>& tasks_;
  const int64_t tall_, rows_;
  const std::vector<int64_t> bounds_;
  Buffer<A> x_, y_, w_, g_, panel_, sums_;
  Buffer<T> turned_, given_;
  A *now_, *before_;
  Waiting waiting_;
  PlacedProducts next_{};
  int64_t o0_ = 0, outputs_ = 0, p0_ = 0, piece_ = 0;
};

// A block, as work: preparing packs a2.
template <class T>
class TwoLayersWork final : public Work {
  using A = accumulate_t<T>;

 public:
  explicit TwoLayersWork(const TwoLayers<T>& s)
      : s_(s),
        each_(divide_up(s.size.I2, divide_up(s.size.I2, kTall))),
        tall_(divide_up(s.size.I2, each_)),
        right_(tall_ * s.size.N * each_),
        tiles_(lane_tiles(s.size.I, kCols<A>)) {
    for (const LaneTile& t : tiles_)
      for (int64_t o = 0; o < s.size.O; o += kOutputs)
        for (int64_t q = 0; q < divide_up(s.size.O2, t.outputs); q += kLanes) tasks_.push_back({t, o, q});
  }
  double bytes() const { return double(sizeof(A)) * tall_ * s_.size.N * each_; }  // packed
  double cost() const override { return double(s_.size.N) * s_.size.O * s_.size.I * s_.size.O2 * s_.size.I2; }
  int64_t preparations() const override { return tall_; }
  void prepare(int64_t h) override {
    A* to = right_ + h * s_.size.N * each_;
    const int64_t width = std::min(each_, s_.size.I2 - h * each_);
    for (int64_t n = 0; n < s_.size.N; ++n)
      for (int64_t r = 0; r < width; ++r)
        to[n * each_ + r] = static_cast<A>(s_.a2[n * s_.a2n + (h * each_ + r) * s_.a2j]);
  }
  int64_t tasks() const override { return static_cast<int64_t>(tasks_.size()); }
  std::unique_ptr<Worker> worker() override { return std::make_unique<TwoLayersWorker<T>>(s_, right_, each_, tasks_); }

 private:
  const TwoLayers<T> s_;
  const int64_t each_, tall_;
  Buffer<A> right_;  // a2 as panels [tall][N][each]
  const std::vector<LaneTile> tiles_;
  std::vector<LaneTask> tasks_;
};
}  // namespace torch_curvature::cpu
