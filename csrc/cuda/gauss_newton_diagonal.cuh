// gauss_newton_diagonal: d[o, i] = sum_vn sign[v, n] J[v, n, o, i]^2, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
// Shapes: g [V, N, S, O], a [N, S, I] (last axes contiguous), sign [V, N] or null, d [O, I] contiguous.
//
// S = 1: one matrix product over n of sum_v sign g^2 by a^2, both formed on the way to shared memory; 2 N O I flops.
// S > 1: for every (v, n) the product over s of a tile of J, squared and summed in registers; J is never stored.
// 2 V N S O I flops. Bytes moved: g and a, again for every tile of d in the other's direction.
// Where there are few tiles, blocks share the samples among them and a second kernel adds their sums in order.
#pragma once
#include "jacobian.cuh"
#include "tile_product.cuh"

namespace torch_curvature::cuda {

template <class T_>
struct DiagonalProblem {
  using T = T_;
  using A = accumulate_t<T>;
  using Key = int64_t;
  static constexpr bool kMirrored = false, kAlong = false;

  Jacobian<T> j;
  const T* sign;
  T* out;
  int64_t batch, rows, cols, segments;
  int depth;

  __device__ Key row_key(int64_t r) const { return r; }
  __device__ Key col_key(int64_t c) const { return c; }
  __device__ auto row_value(int64_t, Key o) const {
    return [p = j.g + o, this](int64_t, int n) -> A {
      A sum = 0;
#pragma unroll 2
      for (int64_t v = 0; v < j.V; ++v) {
        const A g = widen(__ldg(p + v * j.g_v + n * j.g_n));
        sum += sign ? widen(__ldg(sign + v * j.N + n)) * g * g : g * g;
      }
      return sum;
    };
  }
  __device__ auto col_value(int64_t, Key i) const {
    return [p = j.a + i, step = j.a_n](int64_t, int n) -> A {
      const A a = widen(__ldg(p + n * step));
      return a * a;
    };
  }
  __device__ void store(int64_t, Key o, Key i, A sum) const { out[o * j.I + i] = narrow<T>(sum); }
};

template <class T>
struct SquaresProblem {
  Jacobian<T> j;
  const T* sign;
  T* out;
  bool g_vector, a_vector;
  int64_t col_tiles, tiles, splits;
};

template <class T>
using SquaresTile = DirectTileOf<T, true>;
// Resident on a multiprocessor. Two sets of 64 accumulators for bfloat16 and half leave room for one: its 8 warps have
// 32 tensor-core products each to do, at half a warp's rate 512 cycles, while the copies of the next slab are under
// way.
template <class T>
constexpr int kSquaresBlocks = sizeof(T) == 2 ? 1 : SquaresTile<T>::kBlocks;

template <class T>
__global__ void __launch_bounds__(kTileThreads, kSquaresBlocks<T>)
    squares_kernel(SquaresProblem<T> p, accumulate_t<T>* __restrict__ partial) {
  using Tile = SquaresTile<T>;
  auto& s = shared_storage<typename Tile::Shared>();
  const int slabs = ceil_div(static_cast<int>(p.j.S), Tile::kDepth);
  CURVATURE_GRID_STRIDE(item, p.tiles * p.splits) {
    const int64_t tile = item / p.splits, split = item - tile * p.splits;
    const int64_t o0 = tile / p.col_tiles * Tile::kTile, i0 = tile % p.col_tiles * Tile::kTile;
    const int64_t first = p.j.V * p.j.N * split / p.splits, last = p.j.V * p.j.N * (split + 1) / p.splits;
    typename Tile::Accumulators acc = {}, total = {};
    const auto y = p.j.template a_operand<Tile>(i0, p.a_vector);
    for (int64_t t = first, v = p.j.N ? first / p.j.N : 0; t < last; ++v) {
      const int64_t n0 = t - v * p.j.N, n1 = last - v * p.j.N < p.j.N ? last - v * p.j.N : p.j.N;
      const auto x = p.j.template g_operand<Tile>(v, o0, p.g_vector);
      Tile::run(s, x, y, Slabs{n0 * slabs, n1 * slabs, static_cast<int>(p.j.S)}, acc, [&](auto& c, int64_t n) {
        const accumulate_t<T> weight = p.sign ? widen(__ldg(p.sign + v * p.j.N + n)) : accumulate_t<T>(1);
#pragma unroll
        for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
          for (int j = 0; j < Tile::kSide; ++j) total[i][j] += weight * c[i][j] * c[i][j], c[i][j] = 0;
      });
      t += n1 - n0;
    }
#pragma unroll
    for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kSide; ++j) {
        const int64_t o = o0 + Tile::row(i), in = i0 + Tile::column(j);
        if (o >= p.j.O || in >= p.j.I) continue;
        if (p.splits > 1) partial[(split * p.j.O + o) * p.j.I + in] = total[i][j];
        else p.out[o * p.j.I + in] = narrow<T>(total[i][j]);
      }
  }
}

// out[e] = sum over splits of partial[split, e], in order.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    squares_finish_kernel(const accumulate_t<T>* __restrict__ partial, T* __restrict__ out, int64_t count,
                          int64_t splits) {
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(count, kTileThreads)) {
    const int64_t e = block * kTileThreads + threadIdx.x;
    if (e >= count) continue;
    accumulate_t<T> sum = 0;
    for (int64_t k = 0; k < splits; ++k) sum += partial[k * count + e];
    out[e] = narrow<T>(sum);
  }
}

template <class T>
SquaresProblem<T> squares_problem(const Jacobian<T>& j, const T* sign, T* out) {
  constexpr int64_t kTile = SquaresTile<T>::kTile;
  SquaresProblem<T> p{j, sign, out, j.g_vector(), j.a_vector(), ceil_div(j.I, kTile), 0, 1};
  p.tiles = ceil_div(j.O, kTile) * p.col_tiles;
  const int64_t wanted = p.tiles ? ceil_div(kWantedBlocks, p.tiles) : 1, most = j.V * j.N / 2;
  p.splits = wanted < most ? wanted : most > 1 ? most : 1;
  return p;
}
template <class T>
DiagonalProblem<T> diagonal_problem(const Jacobian<T>& j, const T* sign, T* out) {
  return {j, sign, out, 1, j.O, j.I, 1, static_cast<int>(j.N)};
}

// Numbers of the accumulation type that launch_gauss_newton_diagonal wants at `partial`.
template <class T>
int64_t gauss_newton_diagonal_workspace(const Jacobian<T>& j) {
  if (j.S == 1) return tile_product_workspace(diagonal_problem<T>(j, nullptr, nullptr));
  const int64_t splits = squares_problem<T>(j, nullptr, nullptr).splits;
  return splits > 1 ? splits * j.O * j.I : 0;
}

template <class T>
void launch_gauss_newton_diagonal(const Jacobian<T>& j, const T* sign, T* out, accumulate_t<T>* partial,
                                  cudaStream_t stream) {
  if (j.O * j.I == 0) return;
  if (j.S == 1) return launch_tile_product(diagonal_problem(j, sign, out), partial, stream);
  const SquaresProblem<T> p = squares_problem(j, sign, out);
  launch(squares_kernel<T>, grid_blocks(p.tiles * p.splits), dim3(kTileThreads), stream, p, partial);
  if (p.splits > 1)
    launch(squares_finish_kernel<T>, grid_blocks(ceil_div<int64_t>(j.O * j.I, kTileThreads)), dim3(kTileThreads),
           stream, static_cast<const accumulate_t<T>*>(partial), out, j.O * j.I, p.splits);
}
}  // namespace torch_curvature::cuda
