// G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j], for b given by a function: the core of kronecker_sum and of
// gauss_newton_block.
//
// One matrix product of the pairs (o, p) of b by the pairs (i, j) of a x a2. Where a2 is a, only i <= j are multiplied;
// where b is symmetric, only o <= p: a quarter of the flops, and every value is written to its mirrored places, so that
// the result is symmetric to the bit. Flops: 2 N (pairs of b) (pairs of a), less what skipping saves: samples whose
// eight pairs in a panel of b are all zero (units that a ReLU switched off) are left out of that panel's product.
// A task is a run of panels of b by a tile of pairs of a, all i <= j of some forty inputs or two ranges of inputs. Both
// operands are packed once, the products a a2 by every task for itself where they are many (`kShared`). While a task
// multiplies, the results of the one before go to their places. Bytes to memory: G once, the packed operands once for
// every tile of the other.
#pragma once
#include "pairs.h"
#include "work.h"

namespace torch_curvature::cpu {

// Right operands a [N, I] and a2 [N, I2], and the result: G itself, or its places in a larger matrix.
template <class T>
struct KroneckerProblem {
  const T *a, *a2;
  int64_t an, ai, a2n, a2j;
  int64_t N, O, O2, I, I2;
  bool same, symmetric;  // a2 is a; b[n] is symmetric
  T* G;
  Places rows{0, I, 1, -1}, columns{0, I2, 1, -1};
  int64_t ld = O2 * I2;
  bool add = false;
};

// Calls f(transposed, rows, columns) for all the places of the products of one pair (o, p) with a tile.
template <class T, class F>
CURVATURE_INLINE void each_place(const PairTile& t, Pair q, const KroneckerProblem<T>& s, const F& f) {
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0;
  const bool off_diagonal = s.same && !t.triangle, twin = s.symmetric && q.o != q.p;
  auto at = [&](bool transposed, int64_t o, int64_t i, int64_t rows, int64_t p, int64_t j, int64_t columns)
                __attribute__((always_inline)) {
                  f(transposed, PlacedRun{s.rows, o, i, rows, s.I}, PlacedRun{s.columns, p, j, columns, s.I2});
                };
  at(false, q.o, t.i0, height, q.p, t.j0, width);
  if (off_diagonal) at(true, q.o, t.j0, width, q.p, t.i0, height);
  if (twin) at(true, q.p, t.j0, width, q.o, t.i0, height);
  if (twin && off_diagonal) at(false, q.p, t.i0, height, q.o, t.j0, width);
}

template <class T>
CURVATURE_CLONES void fetch_places_of(const PairTile& t, Pair q, const KroneckerProblem<T>& s, int64_t part) {
  each_place(t, q, s, [&](bool, const PlacedRun& rows, const PlacedRun& columns) __attribute__((always_inline)) {
    fetch_places(rows, columns, s.G, s.ld, part, Waiting::kParts);
  });
}

// The products of one pair (o, p) with a tile, [columns / kCols] rows of kCols `stride` apart, in the matrix's dtype:
// one after the other in `line`, which has room for kBeyond more, and, in rows of kWhole, a triangle unfolded or
// [j][i].
template <class T, class A>
CURVATURE_CLONES void arrange(const A* sums, int64_t stride, const PairTile& t, bool turned, T* __restrict__ line,
                              T* __restrict__ tile) {
  constexpr int64_t W = kCols<A>;
  const int64_t height = t.i1 - t.i0, width = t.j1 - t.j0, columns = t.columns();
  for (int64_t c0 = 0; c0 < columns; c0 += W, sums += stride)
    for (int64_t c = 0; c < W; ++c) line[c0 + c] = static_cast<T>(sums[c]);
  if (t.triangle) unfold_triangle<T>(line, height, tile);
  else if (turned) turn_tile<T>(line, width, height, width, tile);
}

// Writes them to all the places that hold them.
template <class T>
CURVATURE_CLONES void scatter(const PairTile& t, Pair q, const KroneckerProblem<T>& s, const T* line, const T* tile) {
  each_place(t, q, s,
             [&](bool transposed, const PlacedRun& rows, const PlacedRun& columns) __attribute__((always_inline)) {
               const bool turned = transposed || t.triangle;
               place_tile<T>(turned ? tile : line, turned ? kWhole : t.j1 - t.j0, rows, columns, s.G, s.ld, s.add);
             });
}

// The products a a2 of all tiles, packed once where they are few; else by every task for itself, chunk by chunk.
template <class T>
class TileProducts {
  using A = accumulate_t<T>;
  static constexpr int64_t W = kCols<A>, kShared = (1 << 25) / sizeof(A), kPrivate = (1 << 19) / sizeof(A),
                           kDepth = 2048 / sizeof(A), kBlock = 64;

 public:
  explicit TileProducts(const KroneckerProblem<T>& s)
      : tiles(pair_tiles(input_ranges(s.I), input_ranges(s.same ? s.I : s.I2), s.same)),
        starts_(count_panels(tiles, widest)),
        shared(double(starts_.back()) * s.N * W <= kShared),
        depth(shared ? kDepth : std::clamp<int64_t>(kPrivate / (widest * W), 64, kDepth)),
        s_(s),
        packed_(shared ? starts_.back() * s.N * W : 0) {}

  int64_t widest = 0;  // panels of one tile
  const std::vector<PairTile> tiles;

 private:
  const std::vector<int64_t> starts_;

 public:
  const bool shared;
  const int64_t depth;  // samples of one chunk

  int64_t panels(int64_t tile) const { return starts_[tile + 1] - starts_[tile]; }
  int64_t columns() const { return shared ? starts_.back() * W : 0; }      // packed once
  int64_t blocks() const { return shared ? divide_up(s_.N, kBlock) : 0; }  // of samples, packed once
  void pack_block(int64_t block) {
    const int64_t n0 = block * kBlock, n1 = std::min(s_.N, n0 + kBlock);
    for (size_t t = 0; t < tiles.size(); ++t) pack(tiles[t], n0, n1, s_.N, packed_ + (starts_[t] * s_.N + n0) * W);
  }
  // Panel 0 of a tile, sample 0 (`shared`).
  const A* panel(int64_t tile) const { return packed_ + starts_[tile] * s_.N * W; }
  void pack(const PairTile& t, int64_t n0, int64_t n1, int64_t rows, A* to) const {
    pack_products<T, A>(s_.a, s_.an, s_.ai, s_.a2, s_.a2n, s_.a2j, t, n0, n1, rows * W, to);
  }

 private:
  static std::vector<int64_t> count_panels(const std::vector<PairTile>& tiles, int64_t& widest) {
    std::vector<int64_t> starts{0};
    for (const PairTile& t : tiles) {
      starts.push_back(starts.back() + divide_up(t.columns(), W));
      widest = std::max(widest, starts.back() - starts[starts.size() - 2]);
    }
    return starts;
  }
  const KroneckerProblem<T>& s_;
  Buffer<A> packed_;
};

constexpr int64_t kRun = 8;  // most panels of b of one task

// What one thread does: tasks, and the places of the last one's results.
template <class T>
class KroneckerWorker final : public Worker {
  using A = accumulate_t<T>;
  static constexpr int64_t W = kCols<A>, kTile = kRows * W;

 public:
  KroneckerWorker(const KroneckerProblem<T>& s, const TileProducts<T>& right, const PairPanels<A>& left,
                  const std::vector<Pair>& pairs, int64_t run)
      : s_(s),
        right_(right),
        left_(left),
        pairs_(pairs),
        run_(run),
        sums_(2 * run * right.widest * kTile),
        products_(right.shared ? 0 : right.widest * right.depth * W),
        line_(right.widest * W + kBeyond),
        turned_(kWhole * kWhole),
        now_(sums_),
        before_(sums_ + run * right.widest * kTile) {}

  // `run` panels of b by one tile.
  void run(int64_t task) override {
    const int64_t tiles = right_.tiles.size(), k0 = task / tiles * run_;
    multiply(task % tiles, k0, std::min(left_.count, k0 + run_));
  }

  void finish() override { proceed(1, 1); }

 private:
  void multiply(int64_t tile, int64_t k0, int64_t k1) {
    const PairTile& t = right_.tiles[tile];
    const int64_t columns = t.columns(), wide = right_.panels(tile), chunks = divide_up(s_.N, right_.depth);
    const int64_t calls = chunks * wide * (k1 - k0);
    const auto product = tile_product<A>();
    int64_t done = 0;
    for (int64_t n0 = 0; n0 < s_.N; n0 += right_.depth) {
      const int64_t n1 = std::min(s_.N, n0 + right_.depth), rows = right_.shared ? s_.N : n1 - n0;
      const A* products = right_.shared ? right_.panel(tile) : products_ - n0 * W;  // sample 0, wherever it would be
      if (!right_.shared) right_.pack(t, n0, n1, rows, products_);
      Depth samples[kRun];
      int64_t from[kRun];
      for (int64_t k = k0; k < k1; ++k) {
        from[k - k0] = left_.from(k, n0);
        samples[k - k0] = {left_.from(k, n1) - from[k - k0],
                           left_.depth[k] == s_.N ? nullptr : left_.index + k * s_.N + from[k - k0]};
      }
      for (int64_t q = 0; q < wide; ++q, products += rows * W)
        for (int64_t k = k0; k < k1; ++k) {
          const Depth& here = samples[k - k0];
          product(left_.values + (k * s_.N + from[k - k0]) * kRows, kRows, here.index ? products : products + n0 * W, W,
                  here, now_ + ((k - k0) * wide + q) * kTile,
                  std::min<int64_t>(kRows, pairs_.size() - (left_.first + k) * kRows), std::min(W, columns - q * W),
                  n0 > 0);
          proceed(++done, calls);
        }
    }
    std::swap(now_, before_);
    tile_ = &t, wide_ = wide, pair_ = (left_.first + k0) * kRows;
    const int64_t count = std::min<int64_t>(pairs_.size() - pair_, (k1 - k0) * kRows);
    waiting_.begin(
        count, [&](int64_t k, int64_t part) { fetch_places_of(t, pairs_[pair_ + k], s_, part); },
        [&](int64_t k) { turn(k); });
  }

  void turn(int64_t k) {
    arrange<T, A>(before_ + k / kRows * wide_ * kTile + k % kRows * W, kTile, *tile_, s_.same || s_.symmetric, line_,
                  turned_);
  }
  void proceed(int64_t done, int64_t of) {
    waiting_.proceed(
        done, of, [&](int64_t k) { scatter<T>(*tile_, pairs_[pair_ + k], s_, line_, turned_); },
        [&](int64_t k, int64_t part) { fetch_places_of(*tile_, pairs_[pair_ + k], s_, part); },
        [&](int64_t k) { turn(k); });
  }

  const KroneckerProblem<T>& s_;
  const TileProducts<T>& right_;
  const PairPanels<A>& left_;
  const std::vector<Pair>& pairs_;
  const int64_t run_;
  Buffer<A> sums_, products_;
  Buffer<T> line_, turned_;
  A *now_, *before_;
  Waiting waiting_;
  const PairTile* tile_ = nullptr;
  int64_t wide_ = 0, pair_ = 0;
};

// All of it, as work. fill(pairs, count, to): the values of up to kRows pairs at all samples, [N][kRows], zero beyond
// them. b that is too large to be packed at once is packed and multiplied round by round.
template <class T, class Fill>
class KroneckerWork final : public Work {
  using A = accumulate_t<T>;
  static constexpr int64_t kPacked = 1 << 26, kTasks = 16;

 public:
  KroneckerWork(const KroneckerProblem<T>& s, const Fill& fill)
      : s_(s),
        fill_(fill),
        pairs_(all_pairs(s.O, s.O2, s.symmetric)),
        right_(s_),
        tiles_(right_.tiles.size()),
        all_(divide_up(pairs_.size(), kRows)),
        most_(std::min(all_, std::max<int64_t>(kPacked / (s.N * kRows * sizeof(A)), 2 * kRun))),
        run_(std::clamp<int64_t>(all_ * tiles_ / kTasks, 1, kRun)),
        left_(s.N, most_, may_skip(s)) {
    left_.count = most_;
  }
  double bytes() const { return double(sizeof(A)) * s_.N * (right_.columns() + most_ * kRows); }  // packed
  double cost() const override { return double(s_.N) * pairs_.size() * s_.I * s_.I2; }
  int64_t preparations() const override { return blocks() + left_.count; }
  void prepare(int64_t task) override {
    if (task < blocks()) right_.pack_block(task);
    else left_.pack(pairs_, task - blocks(), fill_);
  }
  int64_t tasks() const override { return divide_up(left_.count, run_) * tiles_; }
  std::unique_ptr<Worker> worker() override {
    return std::make_unique<KroneckerWorker<T>>(s_, right_, left_, pairs_, run_);
  }
  bool next() override {
    left_.first += left_.count;
    left_.count = std::min(most_, all_ - left_.first);
    return left_.count > 0;
  }

 private:
  static bool may_skip(const KroneckerProblem<T>& s) {
    return s.N < INT32_MAX && products_are_finite(s.a, s.an, s.ai, s.N, s.I) &&
           (s.same || products_are_finite(s.a2, s.a2n, s.a2j, s.N, s.I2));
  }
  int64_t blocks() const { return left_.first == 0 ? right_.blocks() : 0; }

  const KroneckerProblem<T> s_;
  const Fill fill_;
  const std::vector<Pair> pairs_;
  TileProducts<T> right_;
  const int64_t tiles_, all_, most_, run_;
  PairPanels<A> left_;
};

template <class T, class Fill>
void kronecker(const KroneckerProblem<T>& s, const Fill& fill) {
  KroneckerWork<T, Fill> work(s, fill);
  do_together({&work});
}
}  // namespace torch_curvature::cpu
