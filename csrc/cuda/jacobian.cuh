// The Jacobians J[v, n] = sum_s g[v, n, s] (x) a[n, s] of a layer's outputs with respect to its weight, for kernels
// that contract them: g [V, N, S, O] and a [N, S, I] with their last axes contiguous.
#pragma once
#include "direct_tile.cuh"

namespace torch_curvature::cuda {

template <class T>
struct Jacobian {
  const T *g, *a;
  int64_t V, N, S, O, I;
  int64_t g_v, g_n, g_s, a_n, a_s;  // strides, in elements

  // Whether 128-bit loads along the last axes are allowed.
  bool g_vector() const { return vector_aligned(g, O, V > 1 ? g_v : 0, N > 1 ? g_n : 0, S > 1 ? g_s : 0); }
  bool a_vector() const { return vector_aligned(a, I, N > 1 ? a_n : 0, S > 1 ? a_s : 0); }

  // Operands of a product over s: rows of a tile are outputs from o0 on, columns inputs from i0 on; a segment is a
  // sample.
  template <class Tile>
  __device__ __forceinline__ auto g_operand(int64_t v, int64_t o0, bool vector) const {
    const T* p = g + v * g_v + o0 + Tile::own_row();
    return Tile::operand([p, step_n = g_n, step_s = g_s](int64_t n, int s) { return p + n * step_n + s * step_s; },
                         O - o0 - Tile::own_row(), vector);
  }
  template <class Tile>
  __device__ __forceinline__ auto a_operand(int64_t i0, bool vector) const {
    const T* p = a + i0 + Tile::own_row();
    return Tile::operand([p, step_n = a_n, step_s = a_s](int64_t n, int s) { return p + n * step_n + s * step_s; },
                         I - i0 - Tile::own_row(), vector);
  }
};
}  // namespace torch_curvature::cuda
