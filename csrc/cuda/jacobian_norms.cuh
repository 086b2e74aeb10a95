// jacobian_norms: out[v, n] = |J[v, n]|_F^2, J[v, n] = sum_s g[v, n, s] (x) a[n, s]
// Shapes: g [V, N, S, O], a [N, S, I] (last axes contiguous), out [V, N] contiguous.
//
// S = 1: |g|^2 |a|^2, a warp a sample; bytes moved: g and a once.
// S > 1, small: sum_st (a_s . a_t)(g_s . g_t) tile by tile, see jacobian_gram.cuh; 2 S^2 (O + I) V N flops, half by
// symmetry. S > 1, large: tiles of J by a product over s, squared and summed in registers; 2 S O I V N flops. The
// launcher counts both.
#pragma once
#include "jacobian_gram.cuh"

namespace torch_curvature::cuda {

template <class T>
__device__ __forceinline__ accumulate_t<T> squared_norm(const T* __restrict__ x, int64_t n, bool vector) {
  accumulate_t<T> sum = 0;
  const int lane = threadIdx.x % 32;
  if (vector) {
    for (int64_t i = lane * kPerVector<T>; i < n; i += 32 * kPerVector<T>) {
      const auto group = load_pack<kPerVector<T>>(x + i);
#pragma unroll
      for (int k = 0; k < kPerVector<T>; ++k) sum += widen(group.v[k]) * widen(group.v[k]);
    }
  } else {
    for (int64_t i = lane; i < n; i += 32) sum += widen(__ldg(x + i)) * widen(__ldg(x + i));
  }
  return sum_lanes<32>(sum);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 4)
    norms_kernel(Jacobian<T> j, bool g_vector, bool a_vector, T* __restrict__ out) {
  constexpr int kWarps = kTileThreads / 32;
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(j.N, kWarps)) {
    const int64_t n = block * kWarps + threadIdx.x / 32;
    if (n >= j.N) continue;  // a whole warp
    const auto a = squared_norm(j.a + n * j.a_n, j.I, a_vector);
    for (int64_t v = 0; v < j.V; ++v) {
      const auto g = squared_norm(j.g + v * j.g_v + n * j.g_n, j.O, g_vector);
      if (threadIdx.x % 32 == 0) out[v * j.N + n] = narrow<T>(g * a);
    }
  }
}

template <class T>
using NormsTile = DirectTileOf<T, true>;

template <class T>
struct NormsShared {
  typename NormsTile<T>::Shared operands;
  accumulate_t<T> partial[kTileThreads / 32];
};

// partial[(v, n), tile] = sum of the squares of a tile of J[v, n].
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    norms_tile_kernel(Jacobian<T> j, bool g_vector, bool a_vector, accumulate_t<T>* __restrict__ partial) {
  using Tile = NormsTile<T>;
  auto& s = shared_storage<NormsShared<T>>();
  const int slabs = ceil_div(static_cast<int>(j.S), Tile::kDepth);
  const int64_t col_tiles = ceil_div<int64_t>(j.I, Tile::kTile),
                tiles = ceil_div<int64_t>(j.O, Tile::kTile) * col_tiles;
  CURVATURE_GRID_STRIDE(item, j.V * j.N * tiles) {
    const int64_t sample = item / tiles, tile = item - sample * tiles, v = sample / j.N, n = sample - v * j.N;
    const int64_t o0 = tile / col_tiles * Tile::kTile, i0 = tile % col_tiles * Tile::kTile;
    typename Tile::Accumulators acc = {};
    Tile::run(s.operands, j.template g_operand<Tile>(v, o0, g_vector), j.template a_operand<Tile>(i0, a_vector),
              Slabs{n * slabs, (n + 1) * slabs, static_cast<int>(j.S)}, acc, [](auto&, int64_t) {});
    accumulate_t<T> sum = 0;  // rows and columns past the end are zero, but not where zero met infinity
#pragma unroll
    for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
      for (int k = 0; k < Tile::kSide; ++k)
        if (o0 + Tile::row(i) < j.O && i0 + Tile::column(k) < j.I) sum += acc[i][k] * acc[i][k];
    sum = sum_block<kTileThreads>(sum, s.partial);
    if (threadIdx.x == 0) partial[item] = sum;
  }
}

// out[sample] = sum over tiles, in order.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    norms_finish_kernel(const accumulate_t<T>* __restrict__ partial, T* __restrict__ out, int64_t samples,
                        int64_t tiles) {
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(samples, kTileThreads)) {
    const int64_t sample = block * kTileThreads + threadIdx.x;
    if (sample >= samples) continue;
    accumulate_t<T> sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += partial[sample * tiles + t];
    out[sample] = narrow<T>(sum);
  }
}

// Multiply-adds of the two forms for one (v, n), tiles padded as they are.
template <class T>
bool norms_by_gram(const Jacobian<T>& j) {
  constexpr int64_t kGram = GramTile<T>::kTile, kForm = NormsTile<T>::kTile;
  const auto up = [](int64_t x, int64_t to) { return static_cast<double>(ceil_div(x, to) * to); };
  const double blocks = up(j.S, kGram) / kGram;
  const double pairs = j.S <= kGram ? static_cast<double>(kGram) * j.S : up(j.S, kGram) * kGram * (blocks + 1) / 2;
  return pairs * (j.O + j.I) < up(j.O, kForm) * up(j.I, kForm) * j.S;
}
template <class T>
int64_t norms_tiles(const Jacobian<T>& j) {
  constexpr int64_t kTile = NormsTile<T>::kTile;
  return ceil_div(j.O, kTile) * ceil_div(j.I, kTile);
}

// Numbers of the accumulation type that launch_jacobian_norms wants at `partial`.
template <class T>
int64_t jacobian_norms_workspace(const Jacobian<T>& j) {
  return j.S <= 1 || norms_by_gram(j) ? 0 : j.V * j.N * norms_tiles(j);
}

template <class T>
void launch_jacobian_norms(const Jacobian<T>& j, T* out, accumulate_t<T>* partial, cudaStream_t stream) {
  const int64_t samples = j.V * j.N;
  if (samples == 0) return;
  if (j.S <= 1) {
    Jacobian<T> one = j;
    if (j.S == 0) one.O = one.I = 0;  // an empty sum
    launch(norms_kernel<T>, grid_blocks(ceil_div<int64_t>(j.N, kTileThreads / 32)), dim3(kTileThreads), stream, one,
           j.g_vector(), j.a_vector(), out);
  } else if (norms_by_gram(j)) {
    launch_norms_by_gram(j, out, stream);
  } else {
    const int64_t tiles = norms_tiles(j);
    if (samples * tiles > 0)
      launch(norms_tile_kernel<T>, grid_blocks(samples * tiles), dim3(kTileThreads), stream, j, j.g_vector(),
             j.a_vector(), partial);
    launch(norms_finish_kernel<T>, grid_blocks(ceil_div<int64_t>(samples, kTileThreads)), dim3(kTileThreads), stream,
           static_cast<const accumulate_t<T>*>(partial), out, samples, tiles);
  }
}
}  // namespace torch_curvature::cuda
