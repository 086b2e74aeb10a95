// Operands of the contractions of Jacobians J[v, n] = sum_s g[v, n, s] (x) a[n, s], and how they are packed.
#pragma once
#include "kernel.h"
#include "tile_product.h"

namespace torch_curvature::cpu {

// g [V, N, S, O] and a [N, S, I] with any strides.
template <class T>
struct Jacobian {
  Strided<4> hold_g;
  Strided<3> hold_a;
  JacobianSizes size;
  const T *g, *a;
  int64_t gv, gn, gs, go, an, as, ai;

  Jacobian(const Tensor& tg, const Tensor& ta, const JacobianSizes& s)
      : hold_g(strided<4>(tg, {})),
        hold_a(strided<3>(ta, {})),
        size(s),
        g(hold_g.data<T>()),
        a(hold_a.data<T>()),
        gv(hold_g.core[0]),
        gn(hold_g.core[1]),
        gs(hold_g.core[2]),
        go(hold_g.core[3]),
        an(hold_a.core[0]),
        as(hold_a.core[1]),
        ai(hold_a.core[2]) {}
  const T* g_at(int64_t v, int64_t n) const { return g + v * gv + n * gn; }
  const T* a_at(int64_t n) const { return a + n * an; }
};

// sign [V, N], ones where left out
template <class T>
struct Sign {
  const T* data = nullptr;
  int64_t v = 0, n = 0;
  explicit Sign(const std::optional<Tensor>& sign) {
    if (!sign) return;
    data = static_cast<const T*>(sign->data_ptr());
    v = sign->stride(0), n = sign->stride(1);
  }
  accumulate_t<T> operator()(int64_t iv, int64_t in) const {
    return data ? static_cast<accumulate_t<T>>(data[iv * v + in * n]) : accumulate_t<T>(1);
  }
};

template <class A>
int64_t panels(int64_t columns) {
  return divide_up(columns, kCols<A>);
}
template <class A>
int64_t panel_width(int64_t columns, int64_t panel) {
  return std::min(kCols<A>, columns - panel * kCols<A>);
}

// A matrix [depth, columns] as panels [panels][depth][kCols].
template <class T, class A>
void pack_panels(const T* x, int64_t depth, int64_t depth_stride, int64_t columns, int64_t stride, A* out) {
  if (stride == 1) return pack_rows_in_order<T, A>(x, depth, depth_stride, columns, out);
  for (int64_t p = 0; p < panels<A>(columns); ++p)
    pack_panel<T, A>(x + p * kCols<A> * stride, depth, depth_stride, stride, panel_width<A>(columns, p),
                     out + p * depth * kCols<A>);
}

// Tile (rows 8 r.. of x, panel q of y) of x^T y, both packed with the same depth.
template <class A>
CURVATURE_INLINE void packed_tile(TileProduct<A> product, const A* x, int64_t r, int64_t x_columns, const A* y,
                                  int64_t q, int64_t y_columns, int64_t depth, A* tile) {
  constexpr int64_t W = kCols<A>, kBands = W / kRows;
  product(x + r / kBands * depth * W + r % kBands * kRows, W, y + q * depth * W, W, {depth}, tile,
          std::min(kRows, x_columns - r * kRows), panel_width<A>(y_columns, q), false);
}

// lanes[c] += sum_r x[r, c]^2 over the rows and columns of a tile that count.
template <class A>
CURVATURE_CLONES void add_squares(const A* __restrict__ x, int64_t rows, int64_t cols, A* __restrict__ lanes) {
  A sum[kCols<A>] = {};
  if (cols == kCols<A>)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kCols<A>; ++c) sum[c] += x[r * kCols<A> + c] * x[r * kCols<A> + c];
  else
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) sum[c] += x[r * kCols<A> + c] * x[r * kCols<A> + c];
  for (int64_t c = 0; c < kCols<A>; ++c) lanes[c] += sum[c];
}

template <class A>
CURVATURE_CLONES void add_weighted_squares(const A* __restrict__ tile, A w, A* __restrict__ sum) {
  for (int64_t k = 0; k < kRows * kCols<A>; ++k) sum[k] += w * tile[k] * tile[k];
}

// Columns of a matrix [S, count]: `stride` apart, positions `step` apart.
struct Columns {
  int64_t count, stride, step;
};

// x^T y for x [S, rows], y [S, cols] of one sample, tile by tile. y is packed; x is read in place where it is
// contiguous along S (then it is never packed), else packed too.
template <class T>
class SampleProduct {
 public:
  using A = accumulate_t<T>;
  SampleProduct(int64_t S, Columns x, Columns y)
      : S_(S),
        x_(x),
        y_(y),
        packed_x_(in_place(x) ? 0 : panels<A>(x.count) * S * kCols<A>),
        packed_y_(panels<A>(y.count) * S * kCols<A>) {}
  static bool in_place(const Columns& x) { return std::is_same_v<T, A> && x.step == 1; }

  void set_x(const T* x) {
    if (in_place(x_)) at_ = x;
    else pack_panels<T, A>(x, S_, x_.step, x_.count, x_.stride, packed_x_);
  }
  void set_y(const T* y) { pack_panels<T, A>(y, S_, y_.step, y_.count, y_.stride, packed_y_); }
  int64_t bands() const { return divide_up(x_.count, kRows); }
  int64_t columns() const { return panels<A>(y_.count); }

  // Rows kRows r.. and columns kCols q..; of what lies beyond the matrix nothing is said.
  void tile(int64_t r, int64_t q, A* out) const {
    if constexpr (std::is_same_v<T, A>)
      if (in_place(x_)) {
        int64_t offsets[kRows];
        for (int64_t k = 0; k < kRows; ++k) offsets[k] = k * x_.stride;
        return in_place_(at_ + r * kRows * x_.stride, 1, offsets, packed_y_ + q * S_ * kCols<A>, kCols<A>, S_, out,
                         std::min(kRows, x_.count - r * kRows), panel_width<A>(y_.count, q));
      }
    packed_tile<A>(product_, packed_x_, r, x_.count, packed_y_, q, y_.count, S_, out);
  }

 private:
  int64_t S_;
  Columns x_, y_;
  const T* at_ = nullptr;
  Buffer<A> packed_x_, packed_y_;
  TileProduct<A> product_ = tile_product<A>();
  TileProductInPlace<A> in_place_ = tile_product_in_place<A>();
};

// Whether tiles of J^T = a^T g cost less than those of J = g^T a, for outputs and inputs of these numbers:
// multiply-adds of one position in whole tiles, and as many as it takes to pack an element.
template <class T>
bool inputs_as_rows(const Jacobian<T>& J, int64_t O, int64_t I) {
  constexpr double kPack = 16;
  const double V = J.size.V;
  auto cost = [&](int64_t rows, int64_t step, double row_packs, int64_t cols, double col_packs) {
    const double packed = cols * col_packs + (SampleProduct<T>::in_place({rows, 0, step}) ? 0 : rows * row_packs);
    const int64_t half = kCols<accumulate_t<T>> / 2;
    return V * divide_up(rows, 4) * 4 * divide_up(cols, half) * half + kPack * packed;
  };
  return cost(I, J.as, 1, O, V) < cost(O, J.gs, V, I, 1);
}
}  // namespace torch_curvature::cpu
