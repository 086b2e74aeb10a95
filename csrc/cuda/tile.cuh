// A tile of a matrix product in the precision of its operands: c[r, q] += sum_k x(r, k) y(q, k), in float32 on the
// ordinary units, or in float64 on tensor cores, where they multiply and add in float64 (twice the rate on sm_80 and
// sm_90, the same on sm_120).
//
// An operand is anything that gives values: a matrix in global memory, or products and sums formed on the way to shared
// memory. The depth k runs through `segments` runs of `depth` each (a run a sample, say); after each the caller may
// fold the tile into something else. Tiles are double buffered: the next slab's values are fetched into registers while
// the present one is multiplied.
#pragma once
#include "ptx.cuh"

namespace torch_curvature::cuda {

// Where a mainloop is: a run of slabs over segments.
struct Slabs {
  int64_t first, last;  // slabs to do, counted over all segments
  int depth;            // of one segment
};

constexpr int kTileThreads = 256;

// r[0 .. Count) = p[0 .. Count), zeros from `left` on; by 128-bit loads where `vector` says that they are aligned.
template <int Count, class T, class A>
__device__ __forceinline__ void load_run(const T* p, int64_t left, bool vector, A (&r)[Count]) {
  if (vector && left >= Count) {
#pragma unroll
    for (int q = 0; q < Count; q += kPerVector<T>) {
      const auto group = load_pack<kPerVector<T>>(p + q);
#pragma unroll
      for (int e = 0; e < kPerVector<T>; ++e) r[q + e] = widen(group.v[e]);
    }
  } else {
#pragma unroll
    for (int q = 0; q < Count; ++q) r[q] = q < left ? widen(__ldg(p + q)) : A(0);
  }
}

// Tile x Tile results by 256 threads, kSide x kSide each.
template <class Acc, int TileEdge>
struct PlainTile {
  using A = Acc;
  static constexpr bool kTensor = std::is_same_v<A, double>;
  static constexpr int kTile = TileEdge, kDepth = 1024 / kTile, kSide = kTile / 16, kFetch = 4, kPitch = kTile + 4;
  static constexpr int kBlocks = kTile == 64 && !kTensor ? 3 : 2;  // resident on a multiprocessor
  static constexpr bool kRowQuads = true;
  struct Shared {
    alignas(32) A x[2][kDepth][kPitch], y[2][kDepth][kPitch];
  };
  using Accumulators = A[kSide][kSide];

  // Tile row (or column) of this thread's i-th: groups of four neighbours, 64 apart, so that a warp's loads have no
  // conflicts. On tensor cores: eight warps, two by four, of 8 x 8 blocks.
  static __device__ __forceinline__ int place(int which, int i) { return i / 4 * 64 + which * 4 + i % 4; }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 128 * (kTile / 2); }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * (kTile / 4); }
  // All threads' i-th rows together are kRowGroups rows: a thread is of group row_group().
  static constexpr int kRowGroups = 16, kNeighbours = kTensor ? 2 : 4;  // columns next to each other in memory
  static __device__ __forceinline__ int row_group() {
    return kTensor ? threadIdx.x / 128 * 8 + threadIdx.x % 32 / 4 : threadIdx.x / 16;
  }
  static __device__ __forceinline__ int row_of(int group, int i) {
    if constexpr (kTensor) return group / 8 * (kTile / 2) + i * 8 + group % 8;
    else return place(group, i);
  }
  static __device__ __forceinline__ int row(int i) { return row_of(row_group(), i); }
  static __device__ __forceinline__ int column(int j) {
    if constexpr (kTensor) return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
    else return place(threadIdx.x % 16, j);
  }

  // The thread fetches values of one row of the tile, its own, at kFetch depths: neighbours read neighbouring rows.
  // value(segment, k) -> A is bound to that row.
  template <class F>
  struct Across {
    F value;
    static __device__ __forceinline__ int own_row() { return threadIdx.x % kTile; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
#pragma unroll
      for (int q = 0; q < kFetch; ++q) {
        const int k = k0 + threadIdx.x / kTile + q * (kTileThreads / kTile);
        r[q] = k < depth ? value(segment, k) : A(0);
      }
    }
    static __device__ __forceinline__ void put(A (&slab)[kDepth][kPitch], const A (&r)[kFetch]) {
#pragma unroll
      for (int q = 0; q < kFetch; ++q)
        slab[threadIdx.x / kTile + q * (kTileThreads / kTile)][threadIdx.x % kTile] = r[q];
    }
  };
  // The thread fetches kFetch consecutive depths of one row: for operands that are contiguous along the depth.
  // values(segment, k, depth, r) fills r[0..3] with the values at k..k+3; those past the depth are zero.
  template <class F>
  struct Along {
    F values;
    static constexpr int kQuads = kDepth / kFetch;
    static __device__ __forceinline__ int own_row() { return threadIdx.x / kQuads; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
      const int k = k0 + threadIdx.x % kQuads * kFetch;
      values(segment, k, depth, r);
    }
    static __device__ __forceinline__ void put(A (&slab)[kDepth][kPitch], const A (&r)[kFetch]) {
#pragma unroll
      for (int q = 0; q < kFetch; ++q) slab[threadIdx.x % kQuads * kFetch + q][threadIdx.x / kQuads] = r[q];
    }
  };
  // The thread fetches four neighbouring rows at one depth: for operands that are contiguous along the rows.
  // values(segment, k, r) fills r[0..3] with the values of rows own_row() and on.
  template <class F>
  struct Quads {
    F values;
    static_assert(kTile / kFetch * kDepth == kTileThreads, "one fetch a thread");
    static __device__ __forceinline__ int own_row() { return threadIdx.x % (kTile / kFetch) * kFetch; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
      const int k = k0 + threadIdx.x / (kTile / kFetch);
      if (k < depth) {
        values(segment, k, r);
      } else {
#pragma unroll
        for (int q = 0; q < kFetch; ++q) r[q] = 0;
      }
    }
    static __device__ __forceinline__ void put(A (&slab)[kDepth][kPitch], const A (&r)[kFetch]) {
      Pack<A, kPerVector<A>> group[kFetch / kPerVector<A>];
#pragma unroll
      for (int q = 0; q < kFetch; ++q) group[q / kPerVector<A>].v[q % kPerVector<A>] = r[q];
#pragma unroll
      for (int q = 0; q < kFetch; q += kPerVector<A>)
        store_pack(&slab[threadIdx.x / (kTile / kFetch)][own_row() + q], group[q / kPerVector<A>]);
    }
  };
  template <class F>
  static __device__ __forceinline__ Quads<F> quads(F f) {
    return {f};
  }
  template <class F>
  static __device__ __forceinline__ Across<F> across(F f) {
    return {f};
  }
  template <class F>
  static __device__ __forceinline__ Along<F> along(F f) {
    return {f};
  }

  static __device__ __forceinline__ void multiply(const A (&x)[kDepth][kPitch], const A (&y)[kDepth][kPitch],
                                                  Accumulators& acc) {
    if constexpr (kTensor) return multiply_tensor(x, y, acc);
    const int tx = threadIdx.x % 16 * 4, ty = threadIdx.x / 16 * 4;
#pragma unroll(kTile == 128 ? 2 : kDepth)  // all of a large tile's would take more registers than two blocks have
    for (int k = 0; k < kDepth; ++k) {
      Pack<A, 4> u[kSide / 4], v[kSide / 4];
#pragma unroll
      for (int b = 0; b < kSide / 4; ++b)
        u[b] = load_pack<4>(&x[k][ty + b * 64]), v[b] = load_pack<4>(&y[k][tx + b * 64]);
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) acc[i][j] += u[i / 4].v[i % 4] * v[j / 4].v[j % 4];
    }
  }

  // A warp's rows in blocks of 8 by as many columns in blocks of 8, depths in fours. Rows of a slab lie 4 numbers
  // further along the banks than the row before, so that the loads of a warp have no conflicts.
  static __device__ __forceinline__ void multiply_tensor(const A (&x)[kDepth][kPitch], const A (&y)[kDepth][kPitch],
                                                         Accumulators& acc) {
    const int at = threadIdx.x % 32 / 4, depth = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      A u[kSide], v[kSide / 2];
#pragma unroll
      for (int i = 0; i < kSide; ++i) u[i] = x[k + depth][warp_row() + i * 8 + at];
#pragma unroll
      for (int j = 0; j < kSide / 2; ++j) v[j] = y[k + depth][warp_column() + j * 8 + at];
      mma_tiles<kSide, kSide / 2>(acc, u, v);
    }
  }

  // fold(acc, segment) is called after the last slab of every segment. Ends with all threads past their last read of
  // shared memory.
  template <class X, class Y, class Fold>
  static __device__ __forceinline__ void run(Shared& s, const X& x, const Y& y, const Slabs& slabs, Accumulators& acc,
                                             Fold fold) {
    if (slabs.first >= slabs.last) return;  // the same for all threads
    const int each = ceil_div(slabs.depth, kDepth);
    int64_t segment = slabs.first / each;
    int slab = static_cast<int>(slabs.first - segment * each);
    A u[kFetch], v[kFetch];
    auto fetch = [&] {
      x.fetch(u, segment, slab * kDepth, slabs.depth);
      y.fetch(v, segment, slab * kDepth, slabs.depth);
    };
    int buffer = 0;
    fetch();
    X::put(s.x[0], u), Y::put(s.y[0], v);
    for (int64_t left = slabs.last - slabs.first; left > 0; --left) {
      __syncthreads();
      const int64_t present = segment;
      const bool segment_ends = slab + 1 == each;
      if (segment_ends) ++segment, slab = 0;
      else ++slab;
      const bool more = left > 1;
      if (more) fetch();
      multiply(s.x[buffer], s.y[buffer], acc);
      if (segment_ends) fold(acc, present);
      if (more) {
        buffer ^= 1;
        X::put(s.x[buffer], u), Y::put(s.y[buffer], v);
      }
    }
    __syncthreads();
  }
};
}  // namespace torch_curvature::cuda
