// jacobian_gram: out[v, n, w, m] = (J[v, n], K[w, m])_F, J[v, n] = sum_s g[v, n, s] (x) a[n, s], K of g2, a2 likewise
// Shapes: g [V, N, S, O], a [N, S, I], g2 [V2, N2, S2, O], a2 [N2, S2, I] (last axes contiguous), out [V, N, V2, N2].
//
// out = sum_st (a[n, s] . a2[m, t]) (g[v, n, s] . g2[w, m, t]): a block takes the rows (n, s) of a tile's worth of
// samples by the columns (m, t) of another's. It computes the products of a once and keeps them in registers, then for
// each (v, w) those of g, multiplies element by element, and sums over s and t: no array of S by S2, nor one per
// sample, goes to memory. With more positions than a tile has rows, it loops over tiles of them for one pair (n, m).
// Without g2 and a2 only pairs n >= m are computed and mirrored: symmetric to the bit.
// Flops: 2 S S2 N N2 (V V2 O + I), half where symmetric. Where S is large, forming J costs less: gram_by_jacobian.cuh.
#pragma once
#include "jacobian.cuh"
#include "pairs.cuh"

namespace torch_curvature::cuda {

template <class T>
using GramTile = DirectTileOf<T, false>;
template <class T>
constexpr int kGramBlocks = sizeof(T) == 8 ? 1 : 2;  // resident on a multiprocessor: two sets of accumulators are kept

template <class T>
struct GramProblem {
  Jacobian<T> left, right;
  T* out;
  bool symmetric;  // right is left
  bool add;        // to what is in out
  bool norms;      // only the diagonal: out [V, N]
  bool g_vector, a_vector, g2_vector, a2_vector;
  int64_t per_row = 0, per_col = 0;                                        // samples of a tile of rows, of columns
  int64_t row_tiles = 0, col_tiles = 0, tiles = 0, pairs = 0, chunks = 0;  // pairs (v, w); chunks of them
};

// A thread's operand of one tile: the row (n, s) that it fetches is the same for a and g.
struct GramRow {
  int n, s;
  bool valid;
};

template <class T>
struct GramShared {
  using A = accumulate_t<T>;
  static constexpr int kTile = GramTile<T>::kTile;
  union {
    typename GramTile<T>::Shared operands;
    A product[kTile][kTile + 1];  // of the two products, on its way to sums over s and t
  };
  A partial[kTileThreads / 32];
};

template <class T>
struct GramBlock {
  using Tile = GramTile<T>;
  using A = accumulate_t<T>;
  using Accumulators = typename Tile::Accumulators;
  const GramProblem<T>& p;
  GramShared<T>& s;

  // The row that this thread fetches: of samples from n0 on, positions from s0 on (0 unless a sample fills the tile).
  static __device__ __forceinline__ GramRow own(const Jacobian<T>& j, int64_t n0, int64_t per_tile, int64_t s0) {
    const int64_t r = Tile::own_row(), size = per_tile > 1 ? j.S : Tile::kTile;
    const int64_t n = n0 + r / size, position = s0 + r % size;
    return {static_cast<int>(n), static_cast<int>(position), r < per_tile * size && n < j.N && position < j.S};
  }
  __device__ __forceinline__ void inputs(const GramRow& r, const GramRow& c, Accumulators& acc) const {
    const T *x = p.left.a + r.n * p.left.a_n + r.s * p.left.a_s, *y = p.right.a + c.n * p.right.a_n + c.s * p.right.a_s;
    multiply(x, y, r.valid, c.valid, p.a_vector, p.a2_vector, p.left.I, acc);
  }
  __device__ __forceinline__ void gradients(int64_t v, int64_t w, const GramRow& r, const GramRow& c,
                                            Accumulators& acc) const {
    const T* x = p.left.g + v * p.left.g_v + r.n * p.left.g_n + r.s * p.left.g_s;
    const T* y = p.right.g + w * p.right.g_v + c.n * p.right.g_n + c.s * p.right.g_s;
    multiply(x, y, r.valid, c.valid, p.g_vector, p.g2_vector, p.left.O, acc);
  }
  __device__ __forceinline__ void multiply(const T* x, const T* y, bool x_valid, bool y_valid, bool x_vector,
                                           bool y_vector, int64_t depth, Accumulators& acc) const {
#pragma unroll
    for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kSide; ++j) acc[i][j] = 0;
    Tile::run(s.operands, Tile::operand([x](int64_t, int k) { return x + k; }, x_valid, x_vector),
              Tile::operand([y](int64_t, int k) { return y + k; }, y_valid, y_vector),
              Slabs{0, ceil_div(static_cast<int>(depth), Tile::kDepth), static_cast<int>(depth)}, acc,
              [](auto&, int64_t) {});
  }

  __device__ __forceinline__ void put(int64_t v, int64_t n, int64_t w, int64_t m, A sum) const {
    if (p.norms) {
      p.out[v * p.left.N + n] = narrow<T>(sum);
      return;
    }
    T& to = p.out[((v * p.left.N + n) * p.right.V + w) * p.right.N + m];
    const T value = narrow<T>(p.add ? widen(to) + sum : sum);
    to = value;
    // What is added to was symmetric; if it was not, its two sides differ as before.
    if (p.symmetric && (n != m || v != w)) {
      T& mirror = p.out[((w * p.right.N + m) * p.left.V + v) * p.left.N + n];
      mirror = p.add ? narrow<T>(widen(mirror) + sum) : value;
    }
  }
  // Whether (v, n, w, m) is computed, and not the mirror of what is.
  __device__ __forceinline__ bool wanted(int64_t v, int64_t n, int64_t w, int64_t m) const {
    if (n >= p.left.N || m >= p.right.N) return false;
    if (p.norms) return n == m;
    return !p.symmetric || n > m || (n == m && v >= w);
  }

  // Samples of several positions, several to a tile: sums the tile's product over s and t.
  __device__ void sum_positions(const Accumulators& x, const Accumulators& y, int64_t n0, int64_t m0, int64_t v,
                                int64_t w) const {
    const int S = static_cast<int>(p.left.S), S2 = static_cast<int>(p.right.S);
    const int rows = static_cast<int>(p.per_row), cols = static_cast<int>(p.per_col);
    for_each([&](int i, int j) { s.product[Tile::row(i)][Tile::column(j)] = x[i][j] * y[i][j]; });
    __syncthreads();
    // Row r, sample m: over t, into the row's column m. A column is read by its own row's threads before it is written.
    constexpr int kRowThreads = kTileThreads / Tile::kTile;
    const int r = threadIdx.x / kRowThreads;
    for (int first = 0; first < cols; first += kRowThreads) {
      const int m = first + threadIdx.x % kRowThreads;
      A sum = 0;
      if (m < cols)
        for (int t = 0; t < S2; ++t) sum += s.product[r][m * S2 + t];
      __syncthreads();
      if (m < cols) s.product[r][m] = sum;
      __syncthreads();
    }
    for (int at = threadIdx.x; at < rows * cols; at += kTileThreads) {
      const int n = at / cols, m = at - n * cols;
      if (!wanted(v, n0 + n, w, m0 + m)) continue;
      A sum = 0;
      for (int t = 0; t < S; ++t) sum += s.product[n * S + t][m];
      put(v, n0 + n, w, m0 + m, sum);
    }
    __syncthreads();
  }

  // One position a sample: an element of the tile is a result. By way of shared memory, so that the threads of a warp
  // store neighbours.
  __device__ void store_elements(const Accumulators& x, const Accumulators& y, int64_t n0, int64_t m0, int64_t v,
                                 int64_t w) const {
    for_each([&](int i, int j) { s.product[Tile::row(i)][Tile::column(j)] = x[i][j] * y[i][j]; });
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < Tile::kTile * Tile::kTile; at += kTileThreads) {
      const int r = at / Tile::kTile, c = at % Tile::kTile;
      if (wanted(v, n0 + r, w, m0 + c)) put(v, n0 + r, w, m0 + c, s.product[r][c]);
    }
    __syncthreads();
  }

  // One pair of samples with more positions than a tile has rows (or nearly): tiles of positions, summed over the
  // block.
  __device__ void sum_tiles(int64_t n, int64_t m, int64_t v, int64_t w) const {
    if (!wanted(v, n, w, m)) return;                    // the same for all threads
    const bool half = p.symmetric && n == m && v == w;  // symmetric in s and t: tiles below the diagonal count twice
    A sum = 0;
    for (int64_t s0 = 0; s0 < p.left.S; s0 += Tile::kTile)
      for (int64_t t0 = 0; t0 < (half ? s0 + 1 : p.right.S); t0 += Tile::kTile) {
        Accumulators x, y;
        const GramRow r = own(p.left, n, 1, s0), c = own(p.right, m, 1, t0);
        inputs(r, c, x);
        gradients(v, w, r, c, y);
        A part = 0;
        for_each([&](int i, int j) {  // past the end both are zero, but not where zero met infinity
          if (s0 + Tile::row(i) < p.left.S && t0 + Tile::column(j) < p.right.S) part += x[i][j] * y[i][j];
        });
        sum += half && s0 != t0 ? 2 * part : part;
      }
    sum = sum_block<kTileThreads>(sum, s.partial);
    if (threadIdx.x == 0) put(v, n, w, m, sum);
  }

  template <class F>
  static __device__ __forceinline__ void for_each(F f) {
#pragma unroll
    for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kSide; ++j) f(i, j);
  }
};

// Several samples a tile: the products of a are computed once for all pairs (v, w) of the block's chunk.
template <class T, bool OnePosition>
__global__ void __launch_bounds__(kTileThreads, kGramBlocks<T>) gram_kernel(GramProblem<T> p) {
  const GramBlock<T> block{p, shared_storage<GramShared<T>>()};
  CURVATURE_GRID_STRIDE(item, p.tiles * p.chunks) {
    const int64_t tile = item / p.chunks, chunk = item - tile * p.chunks;
    int64_t tile_row = tile, tile_col = tile;
    if (!p.norms) {
      if (p.symmetric) triangle(tile, tile_row, tile_col);
      else tile_row = tile / p.col_tiles, tile_col = tile - tile_row * p.col_tiles;
    }
    const int64_t n0 = tile_row * p.per_row, m0 = tile_col * p.per_col;
    const GramRow r = block.own(p.left, n0, p.per_row, 0), c = block.own(p.right, m0, p.per_col, 0);
    typename GramTile<T>::Accumulators x, y;
    block.inputs(r, c, x);
    for (int64_t pair = p.pairs * chunk / p.chunks; pair < p.pairs * (chunk + 1) / p.chunks; ++pair) {
      const int64_t v = p.norms ? pair : pair / p.right.V, w = p.norms ? pair : pair - v * p.right.V;
      block.gradients(v, w, r, c, y);
      if constexpr (OnePosition) block.store_elements(x, y, n0, m0, v, w);
      else block.sum_positions(x, y, n0, m0, v, w);
    }
  }
}

// One sample fills a tile or more: a block a result (v, n, w, m).
template <class T>
__global__ void __launch_bounds__(kTileThreads, GramTile<T>::kBlocks) gram_long_kernel(GramProblem<T> p) {
  const GramBlock<T> block{p, shared_storage<GramShared<T>>()};
  CURVATURE_GRID_STRIDE(item, p.left.N * (p.norms ? 1 : p.right.N) * p.pairs) {
    const int64_t samples = item / p.pairs, pair = item - samples * p.pairs;
    const int64_t n = p.norms ? samples : samples / p.right.N, m = p.norms ? samples : samples - n * p.right.N;
    const int64_t v = p.norms ? pair : pair / p.right.V, w = p.norms ? pair : pair - v * p.right.V;
    block.sum_tiles(n, m, v, w);
  }
}

template <class T>
GramProblem<T> gram_problem(const Jacobian<T>& left, const Jacobian<T>& right, T* out, bool symmetric, bool add,
                            bool norms) {
  constexpr int64_t kTile = GramTile<T>::kTile, kEnough = 1024;
  GramProblem<T> p{
      left, right, out, symmetric, add, norms, left.g_vector(), left.a_vector(), right.g_vector(), right.a_vector()};
  const auto per_tile = [](int64_t S) { return S > 0 && S <= kTile ? kTile / S : 1; };
  p.per_row = per_tile(left.S), p.per_col = per_tile(right.S);
  p.row_tiles = ceil_div(left.N, p.per_row), p.col_tiles = ceil_div(right.N, p.per_col);
  p.tiles = norms ? p.row_tiles : symmetric ? p.row_tiles * (p.row_tiles + 1) / 2 : p.row_tiles * p.col_tiles;
  p.pairs = norms ? left.V : left.V * right.V;
  const int64_t wanted = p.tiles ? ceil_div(kEnough, p.tiles) : 1;
  p.chunks = wanted < p.pairs ? wanted : p.pairs;
  return p;
}

template <class T>
void launch_gram_problem(const GramProblem<T>& p, cudaStream_t stream) {
  if (p.tiles * p.pairs == 0) return;
  const int64_t results = p.left.N * (p.norms ? 1 : p.right.N) * p.pairs;
  if (p.left.S == 1 && p.right.S == 1)
    launch(gram_kernel<T, true>, grid_blocks(p.tiles * p.chunks), dim3(kTileThreads), stream, p);
  else if (p.per_row > 1 && p.per_col > 1)
    launch(gram_kernel<T, false>, grid_blocks(p.tiles * p.chunks), dim3(kTileThreads), stream, p);
  else launch(gram_long_kernel<T>, grid_blocks(results), dim3(kTileThreads), stream, p);
}

template <class T>
void launch_norms_by_gram(const Jacobian<T>& j, T* out, cudaStream_t stream) {
  launch_gram_problem(gram_problem(j, j, out, true, false, true), stream);
}
}  // namespace torch_curvature::cuda
