// x^T y of one sample for x [S, rows], y [S, cols], a panel of kCols columns at a time with all its rows.
//
// Rows are packed in bands as tall as registers hold, next to one another, and of a panel of y `kDepth` positions stay
// in the first cache while all bands pass by: from beyond it come 4 rows / (rows kCols) bytes a multiply-add. Flops:
// 2 S rows cols, columns in whole panels (in halves at the end).
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
  // exact, and the one after a row's end be there to be read.
  if (stride == 1 && step >= kWide)
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

  // keep: a y is used for several x.
  PanelProduct(int64_t S, Columns x, Columns y, bool keep)
      : S_(S),
        x_(x),
        y_(y),
        each_(divide_up(x.count, divide_up(x.count, kTall))),
        keep_(keep),
        packed_x_(divide_up(x.count, each_) * S * each_ + 16),
        packed_y_(keep ? panels<A>(y.count) * S * W : kDepth * W) {}

  void set_x(const T* x) { pack_bands<T, A>(x, S_, x_.step, x_.stride, x_.count, each_, packed_x_); }
  void set_y(const T* y) {
    at_ = y;
    if (keep_) pack_panels<T, A>(y, S_, y_.step, y_.count, y_.stride, packed_y_);
  }
  int64_t columns() const { return panels<A>(y_.count); }
  int64_t size() const { return divide_up(x_.count, each_) * each_ * W; }  // of a panel, with room for spare rows

  // out [rows][kCols]; of what lies beyond the matrix nothing is said.
  void panel(int64_t q, A* out) const {
    const int64_t width = panel_width<A>(y_.count, q);
    for (int64_t k = 0; k < S_; k += kDepth) {
      const int64_t depth = std::min(kDepth, S_ - k);
      const A* y = packed_y_ + (keep_ ? (q * S_ + k) * W : 0);
      if (!keep_)
        pack_panels<T, A>(at_ + k * y_.step + q * W * y_.stride, depth, y_.step, width, y_.stride, packed_y_);
      for (int64_t r = 0; r < x_.count; r += each_) {
        const A* x = packed_x_ + r * S_ + k * each_;
        const int64_t rows = std::min(each_, x_.count - r);
        if (width > W / 2) tall_(x, each_, y, W, depth, out + r * W, rows, k > 0);
        else product_(x, each_, y, W, {depth}, out + r * W, rows, width, k > 0);
      }
    }
  }

 private:
  const int64_t S_;
  const Columns x_, y_;
  const int64_t each_;  // rows of a band
  const bool keep_;
  const T* at_ = nullptr;
  Buffer<A> packed_x_, packed_y_;
  TileProduct<A> product_ = tile_product<A>();
  TallProduct<A> tall_ = tall_product<A>();
};
}  // namespace torch_curvature::cpu
