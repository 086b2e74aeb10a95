// A matrix product whose operands are described by a Problem: tiles of it by the mainloops of tile.cuh and
// tensor_tile.cuh.
//
// A Problem has
//   T, A               element type of the result, type of accumulation
//   Key                what a row or column index stands for, e.g. a pair (i, j)
//   kMirrored          rows and columns are one set and the result is symmetric: only its lower triangle is computed
//   batch, rows, cols, segments (64 bits), depth (32 bits)     sizes; segments * depth terms are summed
//   row_key(r), col_key(c) -> Key
//   kAlong             operands are contiguous along the depth
//   row_value(b, key), col_value(b, key) -> the operands: callable (segment, k) -> A, or if kAlong
//                      (segment, k, depth, r), which fills the array r with the values from k on, zeros from depth on
//   store(b, row key, col key, A)          writes one result to all its places
// Formed operands are loaded a value at a time, neighbouring threads neighbouring rows: for a slab of a large tile a
// thread issues some 12 loads beside 512 multiply-adds, so wider ones would save 2 %. Operands along the depth, where
// neighbouring threads would read different lines, take 128 bits.
// Where the tiles are too few to fill a GPU the depth is split among blocks; their sums go through `partial` to a
// second kernel that adds them in order. Every result is computed in one order of summation, whoever computes it.
#pragma once
#include "pairs.cuh"
#include "tensor_tile.cuh"

namespace torch_curvature::cuda {

struct TilePlan {
  int64_t row_tiles, col_tiles, tiles;  // tiles of one batch entry that are computed
  int64_t slabs, splits;                // of the depth; tiles * splits pieces of work
};

// Blocks that fill the largest GPU about twice; a share of the depth is worth a block from kLeastSlabs slabs on.
constexpr int64_t kWantedBlocks = 256, kLeastSlabs = 16;

template <class Tile, class Problem>
TilePlan plan_tiles(const Problem& p) {
  TilePlan plan{ceil_div<int64_t>(p.rows, Tile::kTile), ceil_div<int64_t>(p.cols, Tile::kTile), 0,
                p.segments * ceil_div(p.depth, Tile::kDepth), 1};
  plan.tiles = Problem::kMirrored ? plan.row_tiles * (plan.row_tiles + 1) / 2 : plan.row_tiles * plan.col_tiles;
  const int64_t blocks = p.batch * plan.tiles;
  if (blocks > 0 && blocks < kWantedBlocks / 2) {
    const int64_t wanted = kWantedBlocks / blocks, most = plan.slabs / kLeastSlabs;
    plan.splits = wanted < most ? wanted : most > 1 ? most : 1;
  }
  return plan;
}

// What a thread fetches of an operand.
template <class Tile, class Problem>
__device__ __forceinline__ int fetched_row() {
  if constexpr (Problem::kAlong) return Tile::template Along<int>::own_row();
  else return Tile::template Across<int>::own_row();
}
template <class Tile, class Problem, class F>
__device__ __forceinline__ auto fetched(F f) {
  if constexpr (Problem::kAlong) return Tile::along(f);
  else return Tile::across(f);
}

template <class Tile, class Problem>
struct TileProductShared {
  union {
    typename Tile::Shared operands;
    alignas(32) typename Tile::A results[Tile::kRowGroups][Tile::kTile + 8];  // on their way out, some rows at a time
  };
  typename Problem::Key row[Tile::kTile], col[Tile::kTile];
  int64_t item, batch, split, row0, col0;  // of the tile: kept here, not in registers, while the mainloop runs
};

// Results go out through shared memory, so that the threads of a warp store neighbouring columns.
template <class Tile, class Problem>
__device__ __forceinline__ void store_tile(const Problem& p, const TilePlan& plan, TileProductShared<Tile, Problem>& s,
                                           const typename Tile::Accumulators& acc,
                                           typename Problem::A* __restrict__ partial) {
  const int64_t rows_left = p.rows - s.row0, cols_left = p.cols - s.col0;
  const bool diagonal = Problem::kMirrored && s.row0 == s.col0;
  typename Problem::A* part = partial + ((s.split * p.batch + s.batch) * p.rows + s.row0) * p.cols + s.col0;
#pragma unroll
  for (int i = 0; i < Tile::kSide; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kSide; j += Tile::kNeighbours) {
      Pack<typename Tile::A, Tile::kNeighbours> group;
#pragma unroll
      for (int q = 0; q < Tile::kNeighbours; ++q) group.v[q] = acc[i][j + q];
      store_pack(&s.results[Tile::row_group()][Tile::column(j)], group);
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < Tile::kRowGroups * Tile::kTile; at += kTileThreads) {
      const int r = Tile::row_of(at / Tile::kTile, i), c = at % Tile::kTile;
      if (r >= rows_left || c >= cols_left || (diagonal && r < c)) continue;
      const auto sum = s.results[at / Tile::kTile][c];
      if (plan.splits > 1) part[r * p.cols + c] = sum;
      else p.store(s.batch, s.row[r], s.col[c], sum);
    }
    if (i + 1 < Tile::kSide) __syncthreads();  // after the last, the next tile's first barrier does
  }
}

template <class Tile, class Problem>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocks)
    tile_product_kernel(Problem p, TilePlan plan, typename Problem::A* __restrict__ partial) {
  auto& s = shared_storage<TileProductShared<Tile, Problem>>();
  for (int64_t item = blockIdx.x; item < p.batch * plan.tiles * plan.splits; item = s.item + gridDim.x) {
    const int64_t b = item / (plan.tiles * plan.splits), at = item - b * (plan.tiles * plan.splits);
    const int64_t tile = at / plan.splits, split = at - tile * plan.splits;
    int64_t tile_row, tile_col;
    if constexpr (Problem::kMirrored) triangle(tile, tile_row, tile_col);
    else tile_row = tile / plan.col_tiles, tile_col = tile - tile_row * plan.col_tiles;
    const int64_t row0 = tile_row * Tile::kTile, col0 = tile_col * Tile::kTile;

    __syncthreads();  // nothing of the tile before is read any longer
    for (int i = threadIdx.x; i < Tile::kTile; i += kTileThreads) {
      // Rows past the end repeat the last one: they are computed and never stored.
      s.row[i] = p.row_key(row0 + i < p.rows ? row0 + i : p.rows - 1);
      s.col[i] = p.col_key(col0 + i < p.cols ? col0 + i : p.cols - 1);
    }
    if (threadIdx.x == 0) s.item = item, s.batch = b, s.split = split, s.row0 = row0, s.col0 = col0;
    __syncthreads();

    const int own = fetched_row<Tile, Problem>();
    const auto x = fetched<Tile, Problem>(p.row_value(b, s.row[own]));
    const auto y = fetched<Tile, Problem>(p.col_value(b, s.col[own]));
    typename Tile::Accumulators acc = {};
    const Slabs share{plan.slabs * split / plan.splits, plan.slabs * (split + 1) / plan.splits, p.depth};
    Tile::run(s.operands, x, y, share, acc, [](auto&, int64_t) {});

    store_tile<Tile>(p, plan, s, acc, partial);
  }
}

template <class Problem>
__global__ void __launch_bounds__(kTileThreads, 4)
    tile_product_finish_kernel(Problem p, int64_t splits, const typename Problem::A* __restrict__ partial) {
  const int64_t each = p.batch * p.rows * p.cols;
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(each, kTileThreads)) {
    const int64_t e = block * kTileThreads + threadIdx.x;
    if (e >= each) continue;
    const int64_t row = e / p.cols, c = e - row * p.cols, b = row / p.rows, r = row - b * p.rows;
    if (Problem::kMirrored && r < c) continue;
    typename Problem::A sum = 0;
    for (int64_t k = 0; k < splits; ++k) sum += partial[k * each + e];
    p.store(b, p.row_key(r), p.col_key(c), sum);
  }
}

// Calls f with the kind of tile that suits the problem: tensor cores for bfloat16, half and TF32; small tiles for
// float64, and where large ones would be too few.
template <class Problem, class F>
auto with_tile(const Problem& p, F f) {
  using T = typename Problem::T;
  if constexpr (std::is_same_v<T, double>) return f(PlainTile<double, 64>{});
  else if constexpr (std::is_same_v<T, Tf32>) return f(TensorTile<Tf32Format, 128>{});
  else if constexpr (!std::is_same_v<T, float>) return f(TensorTile<SplitFormat, 128>{});
  else if (p.batch * plan_tiles<PlainTile<float, 128>>(p).tiles >= kWantedBlocks / 2) return f(PlainTile<float, 128>{});
  else return f(PlainTile<float, 64>{});
}

// Numbers of type A that launch_tile_product wants at `partial`.
template <class Problem>
int64_t tile_product_workspace(const Problem& p) {
  return with_tile(p, [&](auto tile) {
    const int64_t splits = plan_tiles<decltype(tile)>(p).splits;
    return splits > 1 ? splits * p.batch * p.rows * p.cols : int64_t(0);
  });
}

template <class Problem>
void launch_tile_product(const Problem& p, typename Problem::A* partial, cudaStream_t stream) {
  if (p.batch * p.rows * p.cols == 0) return;
  with_tile(p, [&](auto tile) {
    using Tile = decltype(tile);
    const TilePlan plan = plan_tiles<Tile>(p);
    launch(tile_product_kernel<Tile, Problem>, grid_blocks(p.batch * plan.tiles * plan.splits), dim3(kTileThreads),
           stream, p, plan, partial);
    if (plan.splits > 1)
      launch(tile_product_finish_kernel<Problem>,
             grid_blocks(ceil_div<int64_t>(p.batch * p.rows * p.cols, kTileThreads)), dim3(kTileThreads), stream, p,
             plan.splits, static_cast<const typename Problem::A*>(partial));
  });
}
}  // namespace torch_curvature::cuda
