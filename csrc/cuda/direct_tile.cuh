// A tile of a matrix product whose operands lie in global memory as they are: c[r, q] += sum_k x(r, k) y(q, k).
//
// bfloat16 and half: asynchronous copies into two stages of shared memory, ldmatrix, tensor cores; products are exact
// and accumulated in float32. float32 and float64: the mainloop of tile.cuh; TF32: that of tensor_tile.cuh. Memory is
// contiguous either along the rows
// of the tile (RowsContiguous: an operand stored [k][row]) or along the depth (stored [row][k]); 128-bit loads where
// `vector` says that the caller has checked alignment, element by element where not.
#pragma once
#include "tensor_tile.cuh"

namespace torch_curvature::cuda {

// An operand is made by Tile::operand(address, left, vector). address(segment, k) points at the element of row
// own_row() at depth k; `left`: rows of the operand from own_row() on (none or fewer: those rows count as zero).
template <class T, int TileEdge, bool RowsContiguous>
struct DirectTile {
  using A = float;
  static constexpr int kTile = TileEdge, kDepth = 32, kSide = kTile / 16, kBlocks = kTile == 64 ? 3 : 2;
  static constexpr int kGroup = 8;               // elements of a 16-byte copy
  static constexpr int kWarpTiles = kTile / 32;  // a warp's results: so many 16-row by so many 8-column blocks
  static constexpr int kPad = 8;                 // keeps rows that ldmatrix reads together in different banks
  static constexpr int kCopies = kTile * kDepth / kGroup / kTileThreads;  // a thread, operand and slab
  static constexpr int kOuter = RowsContiguous ? kDepth : kTile, kInner = RowsContiguous ? kTile : kDepth;
  using Stage = uint16_t[kOuter][kInner + kPad];
  struct Shared {
    alignas(32) Stage x[2], y[2];
  };
  using Accumulators = A[kSide][kSide];
  static_assert(RowsContiguous || kCopies == 1, "a thread copies for one row");

  // Eight warps, two by four. Element (i, j) of a thread: see TensorTile.
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 128 * (kTile / 2); }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * (kTile / 4); }
  static __device__ __forceinline__ int row(int i) {
    return warp_row() + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }

  static __device__ __forceinline__ int own_row() {
    return RowsContiguous ? threadIdx.x % (kTile / kGroup) * kGroup : threadIdx.x / (kDepth / kGroup);
  }
  template <class F>
  struct Operand {
    F address;
    int64_t left;
    bool vector;

    __device__ __forceinline__ void fetch(Stage& stage, int64_t segment, int k0, int depth) const {
#pragma unroll
      for (int q = 0; q < kCopies; ++q) {
        const int k = RowsContiguous ? threadIdx.x / (kTile / kGroup) + q * (kTileThreads * kGroup / kTile)
                                     : threadIdx.x % (kDepth / kGroup) * kGroup;
        const int64_t count = RowsContiguous ? (k0 + k < depth ? left : 0) : (left > 0 ? depth - (k0 + k) : 0);
        uint16_t* to = RowsContiguous ? &stage[k][own_row()] : &stage[own_row()][k];
        if (vector) {  // then the count is 8 or more, or none
          cp_async_16(to, count > 0 ? address(segment, k0 + k) : address(segment, 0), count > 0);
        } else {
          Pack<uint16_t, kGroup> group;
#pragma unroll
          for (int e = 0; e < kGroup; ++e)
            group.v[e] = e < count ? *reinterpret_cast<const uint16_t*>(address(segment, k0 + k) + e) : uint16_t(0);
          store_pack(to, group);
        }
      }
    }
  };
  template <class F>
  static __device__ __forceinline__ Operand<F> operand(F address, int64_t left, bool vector) {
    return {address, left, vector};
  }

  static __device__ __forceinline__ void multiply(const Stage& x, const Stage& y,
                                                  float (&c)[kWarpTiles][kWarpTiles][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[kWarpTiles][4], b[kWarpTiles / 2][4];
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const int r = warp_row() + i * 16;
        if constexpr (RowsContiguous) ldmatrix_x4<true>(a[i], &x[k + lane / 16 * 8 + lane % 8][r + lane / 8 % 2 * 8]);
        else ldmatrix_x4<false>(a[i], &x[r + lane % 16][k + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < kWarpTiles / 2; ++j) {
        const int q = warp_column() + j * 16;
        if constexpr (RowsContiguous) ldmatrix_x4<true>(b[j], &y[k + lane % 16][q + lane / 16 * 8]);
        else ldmatrix_x4<false>(b[j], &y[q + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
      }
      mma_tiles<T, kWarpTiles, kWarpTiles>(c, a, b);
    }
  }

  // fold(acc, segment) is called after the last slab of every segment. Ends with all threads past their last read of
  // shared memory, and no copy under way.
  template <class X, class Y, class Fold>
  static __device__ __forceinline__ void run(Shared& s, const X& x, const Y& y, const Slabs& slabs, Accumulators& acc,
                                             Fold fold) {
    if (slabs.first >= slabs.last) return;  // the same for all threads
    const int each = ceil_div(slabs.depth, kDepth);
    int64_t segment = slabs.first / each;
    int slab = static_cast<int>(slabs.first - segment * each);
    auto fetch = [&](int stage) {
      x.fetch(s.x[stage], segment, slab * kDepth, slabs.depth);
      y.fetch(s.y[stage], segment, slab * kDepth, slabs.depth);
    };
    float c[kWarpTiles][kWarpTiles][4];
    copy_in(acc, c);
    fetch(0);
    cp_async_commit();
    int stage = 0;
    for (int64_t left = slabs.last - slabs.first; left > 0; --left) {
      const int64_t present = segment;
      const bool segment_ends = slab + 1 == each;
      if (segment_ends) ++segment, slab = 0;
      else ++slab;
      if (left > 1) fetch(stage ^ 1);
      cp_async_commit();  // an empty group at the end: the count of groups stays the same
      cp_async_wait<1>();
      __syncthreads();
      multiply(s.x[stage], s.y[stage], c);
      if (segment_ends) {
        copy_out(c, acc);
        fold(acc, present);
        copy_in(acc, c);
      }
      __syncthreads();
      stage ^= 1;
    }
    copy_out(c, acc);
    cp_async_wait<0>();
  }

 private:
  static __device__ __forceinline__ void copy_in(const Accumulators& acc, float (&c)[kWarpTiles][kWarpTiles][4]) {
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) c[i / 2][j / 2][i % 2 * 2 + j % 2] = acc[i][j];
  }
  static __device__ __forceinline__ void copy_out(const float (&c)[kWarpTiles][kWarpTiles][4], Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) acc[i][j] = c[i / 2][j / 2][i % 2 * 2 + j % 2];
  }
};

// The same interface where values are fetched through registers: float32 and float64 by PlainTile, TF32 by TensorTile.
template <class Base, class T, bool RowsContiguous>
struct FetchedTile : Base {
  using A = typename Base::A;
  static constexpr bool kQuads = RowsContiguous && Base::kRowQuads;
  static __device__ __forceinline__ int own_row() {
    if constexpr (kQuads) return Base::template Quads<int>::own_row();
    else if constexpr (RowsContiguous) return Base::template Across<int>::own_row();
    else return Base::template Along<int>::own_row();
  }
  template <class F>
  static __device__ __forceinline__ auto operand(F address, int64_t left, bool vector) {
    if constexpr (kQuads) {
      return Base::quads([=](int64_t segment, int k, A(&r)[Base::kFetch]) {
        load_run(left > 0 ? address(segment, k) : nullptr, left, vector, r);
      });
    } else if constexpr (RowsContiguous) {
      return Base::across(
          [=](int64_t segment, int k) -> A { return left > 0 ? widen(__ldg(address(segment, k))) : A(0); });
    } else {
      return Base::along([=](int64_t segment, int k, int depth, A(&r)[Base::kFetch]) {
        const int count = left > 0 ? depth - k : 0;
        load_run(count > 0 ? address(segment, k) : nullptr, count, vector, r);
      });
    }
  }
};

// bfloat16 and half by asynchronous copies, the others through registers.
template <class T, bool RowsContiguous>
using DirectTileOf = std::conditional_t<
    sizeof(T) == 2, DirectTile<T, RowsContiguous ? 128 : 64, RowsContiguous>,
    FetchedTile<std::conditional_t<std::is_same_v<T, Tf32>, TensorTile<Tf32Format, 64>, PlainTile<accumulate_t<T>, 64>>,
                T, RowsContiguous>>;
}  // namespace torch_curvature::cuda
