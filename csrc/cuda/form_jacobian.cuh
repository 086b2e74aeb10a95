// Writes Jacobians J[v, n] = sum_s g[v, n, s] (x) a[n, s] to a workspace [V N, O I] in the type of accumulation: for
// the contractions where every J is used so often that forming it once is cheapest. The callers take pieces of g and a
// at a time, so that the workspace stays bounded. Flops: 2 V N S O I. Bytes moved: J written once; g, a read for each
// tile.
#pragma once
#include "jacobian.cuh"

namespace torch_curvature::cuda {

template <class T>
using FormTile = DirectTileOf<T, true>;

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    form_jacobian_kernel(Jacobian<T> j, bool g_vector, bool a_vector, accumulate_t<T>* __restrict__ out) {
  using Tile = FormTile<T>;
  auto& s = shared_storage<typename Tile::Shared>();
  const int slabs = ceil_div(static_cast<int>(j.S), Tile::kDepth);
  const int64_t col_tiles = ceil_div<int64_t>(j.I, Tile::kTile),
                tiles = ceil_div<int64_t>(j.O, Tile::kTile) * col_tiles;
  CURVATURE_GRID_STRIDE(item, j.V * j.N * tiles) {
    const int64_t sample = item / tiles, tile = item - sample * tiles, v = sample / j.N, n = sample - v * j.N;
    const int64_t o0 = tile / col_tiles * Tile::kTile, i0 = tile % col_tiles * Tile::kTile;
    typename Tile::Accumulators acc = {};
    Tile::run(s, j.template g_operand<Tile>(v, o0, g_vector), j.template a_operand<Tile>(i0, a_vector),
              Slabs{n * slabs, (n + 1) * slabs, static_cast<int>(j.S)}, acc, [](auto&, int64_t) {});
#pragma unroll
    for (int i = 0; i < Tile::kSide; ++i)
#pragma unroll
      for (int k = 0; k < Tile::kSide; ++k) {
        const int64_t o = o0 + Tile::row(i), in = i0 + Tile::column(k);
        if (o < j.O && in < j.I) out[(sample * j.O + o) * j.I + in] = acc[i][k];
      }
  }
}

template <class T>
void launch_form_jacobian(const Jacobian<T>& j, accumulate_t<T>* out, cudaStream_t stream) {
  constexpr int64_t kTile = FormTile<T>::kTile;
  const int64_t items = j.V * j.N * ceil_div(j.O, kTile) * ceil_div(j.I, kTile);
  if (items > 0)
    launch(form_jacobian_kernel<T>, grid_blocks(items), dim3(kTileThreads), stream, j, j.g_vector(), j.a_vector(), out);
}

// out[e] = sum[e] in the result's format, added to what is there if `add`: pieces of bfloat16 and half results are
// summed in float32 first.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    narrow_kernel(const accumulate_t<T>* __restrict__ sum, T* __restrict__ out, int64_t count, bool add) {
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(count, kTileThreads)) {
    const int64_t e = block * kTileThreads + threadIdx.x;
    if (e < count) out[e] = narrow<T>(add ? widen(out[e]) + sum[e] : sum[e]);
  }
}
template <class T>
void launch_narrow(const accumulate_t<T>* sum, T* out, int64_t count, bool add, cudaStream_t stream) {
  launch(narrow_kernel<T>, grid_blocks(ceil_div<int64_t>(count, kTileThreads)), dim3(kTileThreads), stream, sum, out,
         count, add);
}

// How the pieces of a sum over Jacobians go: `each` of the `total` things (samples, outputs) at a time; `wide`: the
// result is summed in a workspace of the type of accumulation, because its own format is narrower.
struct Pieces {
  int64_t total, each;
  bool wide;
};
// Pieces that stay in the second-level cache (40 MB and more on all that we compile for) between being written and
// being read; but `least` things where those take no more than max_workspace_bytes().
constexpr int64_t kCachedBytes = 32 << 20;
template <class T>
Pieces jacobian_pieces(int64_t total, int64_t numbers_per_thing, int64_t least) {
  const auto fit = [&](int64_t bytes) {
    const int64_t count =
        bytes / static_cast<int64_t>(sizeof(accumulate_t<T>)) / (numbers_per_thing ? numbers_per_thing : 1);
    return count < 1 ? int64_t(1) : count;
  };
  const int64_t most = fit(max_workspace_bytes()),
                cached = fit(kCachedBytes < max_workspace_bytes() ? kCachedBytes : max_workspace_bytes());
  int64_t each = least < most ? least : most;
  if (each < cached) each = cached;
  if (each > total) each = total;
  if (each < 1) each = 1;
  return {total, each, sizeof(T) == 2 && each < total};
}
}  // namespace torch_curvature::cuda
