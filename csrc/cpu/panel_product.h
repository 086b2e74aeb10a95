// x^T y of one sample for x [S, rows], y [S, cols], a panel of kCols columns at a time with all its rows.
//
// A large product: x is packed in bands as tall as registers hold, and of a panel of y `kDepth` positions are packed
// and stay in the first cache while all bands pass by. A small one is added to chunk by chunk of positions, so that of
// rows that are contiguous nothing is packed: a chunk of both fits the first cache. In either case the next chunk is
// asked for while this one is multiplied. Flops: 2 S rows cols, columns in whole panels (in halves at the end); bytes
// of x and y once, what is packed twice.
#pragma once
#include "jacobian.h"

namespace torch_curvature::cpu {

// Bands of `each` <= kTall rows: to[band][k][r] = x[k step + (band each + r) stride].
template <class T, class A>
CURVATURE_CLONES void pack_bands(const T* x, int64_t depth, int64_t step, int64_t stride, int64_t count, int64_t each,
                                 A* __restrict__ to) {
  constexpr int64_t kWide = 16;
  static_assert(kTall < kWide);
  if (step == 1) {
    for (int64_t c = 0; c < count; c += each)
      transpose_all<T, A>(x + c * stride, stride, std::min(each, count - c), depth, to + c * depth, each);
    return;
  }
  int64_t k = 0;
  // Sixteen at a time, whatever lies behind a row: it is written where the next position goes. The last one must be
  // exact, and what lies behind the others be there to be read, and part of this band where it is written.
  if (stride == 1 && step >= kWide && (2 * each >= kWide || count <= each))
    for (; k < depth - 1; ++k)
      for (int64_t c = 0; c < count; c += each)
        for (int64_t r = 0; r < kWide; ++r) to[c * depth + k * each + r] = static_cast<A>(x[k * step + c + r]);
  for (; k < depth; ++k)
    for (int64_t c = 0; c < count; c += each)
      for (int64_t r = 0; r < std::min(each, count - c); ++r)
        to[c * depth + k * each + r] = static_cast<A>(x[k * step + (c + r) * stride]);
}

template <class T>
class PanelProduct {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t W = kCols<A>, kDepth = 1024 / sizeof(A);

  PanelProduct(int64_t S, Columns x, Columns y)
      : S_(S),
        x_(x),
        y_(y),
        each_(divide_up(x.count, divide_up(x.count, kTall))),
        // a product that stays in the second cache is added to: then positions are packed as they come
        small_(x.count * panels<A>(y.count) * W <= (1 << 16) / int64_t(sizeof(A))),
        packed_x_(divide_up(x.count, each_) * (small_ ? std::min(S, kDepth) : S) * each_ + 16),
        packed_y_(kDepth * W) {}

  int64_t columns() const { return panels<A>(y_.count); }
  int64_t size() const { return divide_up(x_.count, each_) * each_ * W; }  // of a panel, bands in full
  bool small() const { return small_; }

  void set(const T* x, const T* y) {
    x_at_ = x, y_at_ = y;
    if (!small_) pack_bands<T, A>(x, S_, x_.step, x_.stride, x_.count, each_, packed_x_);
  }
  // out [rows][kCols]; of what lies beyond the matrix nothing is said.
  void panel(int64_t q, A* out) const {
    for (int64_t k = 0; k < S_; k += kDepth) add(q, k, packed_x_ + k * each_, S_, out);
  }
  // All panels of a small product, out [columns()][size()].
  void all(A* out) const {
    if constexpr (std::is_same_v<T, A>)
      if (in_place()) return all_in_place(out);
    for (int64_t k = 0; k < S_; k += kDepth) {
      const int64_t depth = std::min(kDepth, S_ - k);
      pack_bands<T, A>(x_at_ + k * x_.step, depth, x_.step, x_.stride, x_.count, each_, packed_x_);
      for (int64_t q = 0; q < columns(); ++q) add(q, k, packed_x_, depth, out + q * size());
    }
  }

 private:
  static constexpr int64_t kClose = 32768 / sizeof(A);  // numbers that stay in the first cache

  bool in_place() const {  // rows that lie close together, in chunks that are worth adding
    return x_.stride == 1 && y_.stride == 1 && y_.count % W == 0 && 32 * (x_.count + y_.count) <= kClose &&
           x_.step <= 2 * x_.count && y_.step <= 2 * y_.count;
  }
  void all_in_place(A* out) const {
    const int64_t each = kClose / (x_.count + y_.count), bands = divide_up(x_.count, kRows), calls = columns() * bands;
    for (int64_t k = 0; k < S_; k += each) {
      const int64_t depth = std::min(each, S_ - k), after = k + depth, ahead = std::min(each, S_ - after);
      for (int64_t call = 0; call < calls; ++call) {
        const int64_t q = call / bands, r = call % bands * kRows;
        tall_(x_at_ + k * x_.step + r, x_.step, y_at_ + k * y_.step + q * W, y_.step, depth, out + q * size() + r * W,
              std::min(kRows, x_.count - r), W, k > 0);
        for (int64_t s = after + ahead * call / calls; s < after + ahead * (call + 1) / calls; ++s)
          fetch(x_at_ + s * x_.step, x_.count), fetch(y_at_ + s * y_.step, y_.count);
      }
    }
  }
  static void fetch(const T* row, int64_t count) {
    for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(row + c, 0, 2);
  }
  // Positions [k, k + kDepth) of panel q are added to out. x: packed from position k on, bands `positions` long.
  void add(int64_t q, int64_t k, const A* x, int64_t positions, A* out) const {
    const int64_t width = panel_width<A>(y_.count, q), depth = std::min(kDepth, S_ - k);
    const T* y = y_at_ + k * y_.step + q * W * y_.stride;
    pack_panels<T, A>(y, depth, y_.step, width, y_.stride, packed_y_);
    const int64_t ahead = y_.stride == 1 ? std::min(kDepth, S_ - k - depth) : 0, bands = divide_up(x_.count, each_);
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t r = band * each_, rows = std::min(each_, x_.count - r);
      tall_(x + r * positions, each_, packed_y_, W, depth, out + r * W, rows, width, k > 0);
      for (int64_t s = depth + ahead * band / bands; s < depth + ahead * (band + 1) / bands; ++s)
        fetch(y + s * y_.step, width);
    }
  }

  const int64_t S_;
  const Columns x_, y_;
  const int64_t each_;  // rows of a band
  const bool small_;
  const T *x_at_ = nullptr, *y_at_ = nullptr;
  Buffer<A> packed_x_, packed_y_;
  TallProduct<A> tall_ = tall_product<A>();
};
}  // namespace torch_curvature::cpu
