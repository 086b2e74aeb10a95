// A tile of a matrix product on tensor cores whose operands are formed in float32: c[r, q] += sum_k x(r, k) y(q, k).
//
// Each value goes to shared memory as two bfloat16: x = x1 + x2 up to 2^-17 |x|, and the product as x1 y1 + x1 y2 + x2
// y1, accumulated in float32 (products of two bfloat16 or half inputs, formed on the way, would lose half of their
// digits in one bfloat16). Range is that of float32. An infinite value gives NaN. Same interface as SimtTile: see
// there.
#pragma once
#include "ptx.cuh"
#include "tile.cuh"

namespace torch_curvature::cuda {

// 128 x 128 results by 8 warps of 64 x 32.
struct SplitTile {
  using A = float;
  static constexpr int kTile = 128, kDepth = 16, kSide = 8, kFetch = 8, kBlocks = 1;
  static constexpr int kPitch = kDepth + 8;  // rows 48 bytes apart: 8 of them lie in different banks
  using Slab = uint16_t[kTile][kPitch];
  struct Shared {
    alignas(32) Slab x[2], y[2];  // [leading part, rest]
  };
  using Accumulators =
      A[kSide][kSide];  // of 16 x 8 blocks: [4 (block row) + i, 4 (block column) + j] see row(), column()

  // This thread's element (i, j) of kSide x kSide: i counts block rows (i / 2) and halves of them (i % 2), j block
  // columns (j / 2) and neighbours (j % 2).
  static __device__ __forceinline__ int row(int i) {
    return threadIdx.x / 128 * 64 + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return threadIdx.x / 32 % 4 * 32 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }

  // As SimtTile::Across; the thread's kFetch depths are consecutive.
  template <class F>
  struct Across {
    F value;
    static __device__ __forceinline__ int own_row() { return threadIdx.x % kTile; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
#pragma unroll
      for (int q = 0; q < kFetch; ++q) {
        const int k = k0 + threadIdx.x / kTile * kFetch + q;
        r[q] = k < depth ? value(segment, k) : 0.0f;
      }
    }
  };
  template <class F>
  static __device__ __forceinline__ Across<F> across(F f) {
    return {f};
  }

  static __device__ __forceinline__ void put(Slab (&parts)[2], const A (&r)[kFetch]) {
    Pack<uint16_t, kFetch> lead, rest;
#pragma unroll
    for (int q = 0; q < kFetch; ++q) {
      const auto head = __float2bfloat16_rn(r[q]);
      lead.v[q] = __bfloat16_as_ushort(head);
      rest.v[q] = __bfloat16_as_ushort(__float2bfloat16_rn(r[q] - __bfloat162float(head)));
    }
    const int row = threadIdx.x % kTile, k = threadIdx.x / kTile * kFetch;
    store_pack(&parts[0][row][k], lead);
    store_pack(&parts[1][row][k], rest);
  }

  static __device__ __forceinline__ void load_rows(uint32_t (&a)[4][4], const Slab& x) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 128 * 64;
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix_x4<false>(a[i], &x[first + i * 16 + lane % 16][lane / 16 * 8]);
  }
  // Two block columns a load: registers 0, 1 are the fragment of the first, 2, 3 of the second.
  static __device__ __forceinline__ void load_columns(uint32_t (&b)[2][4], const Slab& y) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 32;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4<false>(b[j], &y[first + j * 16 + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  }
  static __device__ __forceinline__ void multiply_parts(const uint32_t (&a)[4][4], const uint32_t (&b)[2][4],
                                                        float (&c)[4][4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma_m16n8k16<__nv_bfloat16>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }

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
    float c[4][4][4];
    for_each_element([&](int i, int j, float& e) { e = acc[i][j]; }, c);
    fetch();
    for (int64_t left = slabs.last - slabs.first; left > 0; --left) {
      put(s.x, u), put(s.y, v);
      __syncthreads();
      const int64_t present = segment;
      const bool segment_ends = slab + 1 == each;
      if (segment_ends) ++segment, slab = 0;
      else ++slab;
      if (left > 1) fetch();
      uint32_t a[4][4], b[2][4];
      load_rows(a, s.x[0]), load_columns(b, s.y[0]);
      multiply_parts(a, b, c);
      load_columns(b, s.y[1]);
      multiply_parts(a, b, c);
      load_rows(a, s.x[1]), load_columns(b, s.y[0]);
      multiply_parts(a, b, c);
      if (segment_ends) {
        for_each_element([&](int i, int j, float& e) { acc[i][j] = e; }, c);
        fold(acc, present);
        for_each_element([&](int i, int j, float& e) { e = acc[i][j]; }, c);
      }
      __syncthreads();
    }
    for_each_element([&](int i, int j, float& e) { acc[i][j] = e; }, c);
  }

 private:
  // f(i, j, element) for the accumulators in the order of fragments.
  template <class F>
  static __device__ __forceinline__ void for_each_element(F f, float (&c)[4][4][4]) {
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) f(i, j, c[i / 2][j / 2][i % 2 * 2 + j % 2]);
  }
};
}  // namespace torch_curvature::cuda
