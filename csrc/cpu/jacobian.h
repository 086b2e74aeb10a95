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
}  // namespace torch_curvature::cpu
