// A tile of a matrix product on tensor cores whose operands are formed in float32: c[r, q] += sum_k x(r, k) y(q, k).
// Same interface as PlainTile: see there. How values go to shared memory and through the tensor cores is a Format:
//
// SplitFormat: as two bfloat16, x = x1 + x2 up to 2^-17 |x|, and the product as x1 y1 + x1 y2 + x2 y1, accumulated in
// float32 (products of two bfloat16 or half inputs, formed on the way, would lose half of their digits in one
// bfloat16). Range is that of float32. An infinite value gives NaN: its second part is infinity less infinity.
// Tf32Format: rounded to TF32, where torch's own setting allows that for float32.
#pragma once
#include "ptx.cuh"
#include "tile.cuh"

namespace torch_curvature::cuda {

// Large tiles resident on a multiprocessor: two, but for where the compiler would spill a few registers of one kernel.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSplitBlocks = 1, kTf32Blocks = 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kSplitBlocks = 2, kTf32Blocks = 1;
#else
constexpr int kSplitBlocks = 2, kTf32Blocks = 2;
#endif

struct SplitFormat {
  using Number = __nv_bfloat16;
  using Element = uint16_t;
  static constexpr int kParts = 2;
  static constexpr int kBlocks = kSplitBlocks;
  static __device__ __forceinline__ void convert(float x, Element (&parts)[kParts]) {
    const auto lead = __float2bfloat16_rn(x);
    parts[0] = __bfloat16_as_ushort(lead);
    parts[1] = __bfloat16_as_ushort(__float2bfloat16_rn(x - __bfloat162float(lead)));
  }
};
struct Tf32Format {
  using Number = Tf32;
  using Element = uint32_t;
  static constexpr int kParts = 1, kBlocks = kTf32Blocks;
  static __device__ __forceinline__ void convert(float x, Element (&parts)[kParts]) { parts[0] = round_to_tf32(x); }
};

// TileEdge x TileEdge results by 8 warps, two by four.
template <class Format, int TileEdge>
struct TensorTile {
  using A = float;
  using Element = typename Format::Element;
  static constexpr int kTile = TileEdge, kDepth = 16, kSide = kTile / 16, kFetch = kTile * kDepth / kTileThreads;
  static constexpr int kBlocks = kTile == 64 ? 3 : Format::kBlocks;  // resident on a multiprocessor
  static constexpr bool kRowQuads = false;
  static constexpr int kGroup = 16 / sizeof(Element);  // elements of a row of ldmatrix; a product takes two such
  static constexpr int kPitch = kDepth + kGroup;       // 8 rows of ldmatrix lie in different banks
  static constexpr int kBlockRows = kTile / 32;        // of 16, a warp's; as many blocks of 8 columns
  static_assert(kFetch % kGroup == 0, "a thread stores whole rows of ldmatrix");
  using Slab = Element[kTile][kPitch];
  struct Shared {
    alignas(32) Slab x[Format::kParts], y[Format::kParts];
  };
  using Accumulators = A[kSide][kSide];
  using Fragments = float[kBlockRows][kBlockRows][4];

  // This thread's element (i, j) of kSide x kSide: i counts block rows (i / 2) and halves of them (i % 2), j block
  // columns (j / 2) and neighbours (j % 2).
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 128 * (kTile / 2); }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 4 * (kTile / 4); }
  static constexpr int kRowGroups = 16, kNeighbours = 2;
  static __device__ __forceinline__ int row_group() { return threadIdx.x / 128 * 8 + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int row_of(int group, int i) {
    return group / 8 * (kTile / 2) + i / 2 * 16 + i % 2 * 8 + group % 8;
  }
  static __device__ __forceinline__ int row(int i) { return row_of(row_group(), i); }
  static __device__ __forceinline__ int column(int j) {
    return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }

  static __device__ __forceinline__ void put_run(Slab (&parts)[Format::kParts], int row, int k, const A (&r)[kFetch]) {
#pragma unroll
    for (int first = 0; first < kFetch; first += kGroup) {
      Pack<Element, kGroup> group[Format::kParts];
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        Element converted[Format::kParts];
        Format::convert(r[first + q], converted);
#pragma unroll
        for (int part = 0; part < Format::kParts; ++part) group[part].v[q] = converted[part];
      }
#pragma unroll
      for (int part = 0; part < Format::kParts; ++part) store_pack(&parts[part][row][k + first], group[part]);
    }
  }
  // As PlainTile::Across and Along; the thread's kFetch depths are consecutive in both.
  template <class F>
  struct Across {
    F value;
    static __device__ __forceinline__ int own_row() { return threadIdx.x % kTile; }
    static __device__ __forceinline__ int own_depth() { return threadIdx.x / kTile * kFetch; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
#pragma unroll
      for (int q = 0; q < kFetch; ++q) {
        const int k = k0 + own_depth() + q;
        r[q] = k < depth ? value(segment, k) : 0.0f;
      }
    }
    static __device__ __forceinline__ void put(Slab (&parts)[Format::kParts], const A (&r)[kFetch]) {
      put_run(parts, own_row(), own_depth(), r);
    }
  };
  template <class F>
  struct Along {
    F values;
    static constexpr int kRuns = kDepth / kFetch;
    static __device__ __forceinline__ int own_row() { return threadIdx.x / kRuns; }
    __device__ __forceinline__ void fetch(A (&r)[kFetch], int64_t segment, int k0, int depth) const {
      values(segment, k0 + threadIdx.x % kRuns * kFetch, depth, r);
    }
    static __device__ __forceinline__ void put(Slab (&parts)[Format::kParts], const A (&r)[kFetch]) {
      put_run(parts, own_row(), threadIdx.x % kRuns * kFetch, r);
    }
  };
  template <class F>
  static __device__ __forceinline__ Across<F> across(F f) {
    return {f};
  }
  template <class F>
  static __device__ __forceinline__ Along<F> along(F f) {
    return {f};
  }

  static __device__ __forceinline__ void load_rows(uint32_t (&a)[kBlockRows][4], const Slab& x, int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i)
      ldmatrix_x4<false>(a[i], &x[warp_row() + i * 16 + lane % 16][k + lane / 16 * kGroup]);
  }
  // Two block columns a load: registers 0, 1 are the fragment of the first, 2, 3 of the second.
  static __device__ __forceinline__ void load_columns(uint32_t (&b)[kBlockRows / 2][4], const Slab& y, int k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kBlockRows / 2; ++j)
      ldmatrix_x4<false>(b[j], &y[warp_column() + j * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * kGroup]);
  }
  static __device__ __forceinline__ void multiply(const Slab (&x)[Format::kParts], const Slab (&y)[Format::kParts],
                                                  Fragments& c) {
#pragma unroll 1  // the fragments of two steps at once would take too many registers
    for (int k = 0; k < kDepth; k += 2 * kGroup) {
      uint32_t a[kBlockRows][4], b[kBlockRows / 2][4];
      load_rows(a, x[0], k), load_columns(b, y[0], k);
      mma_tiles<typename Format::Number, kBlockRows, kBlockRows>(c, a, b);
      if constexpr (Format::kParts == 2) {
        load_columns(b, y[1], k);
        mma_tiles<typename Format::Number, kBlockRows, kBlockRows>(c, a, b);
        load_rows(a, x[1], k), load_columns(b, y[0], k);
        mma_tiles<typename Format::Number, kBlockRows, kBlockRows>(c, a, b);
      }
    }
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
    Fragments c;
    for_each_element([&](int i, int j, float& e) { e = acc[i][j]; }, c);
    fetch();
    for (int64_t left = slabs.last - slabs.first; left > 0; --left) {
      X::put(s.x, u), Y::put(s.y, v);
      __syncthreads();
      const int64_t present = segment;
      const bool segment_ends = slab + 1 == each;
      if (segment_ends) ++segment, slab = 0;
      else ++slab;
      if (left > 1) fetch();
      multiply(s.x, s.y, c);
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
  static __device__ __forceinline__ void for_each_element(F f, Fragments& c) {
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) f(i, j, c[i / 2][j / 2][i % 2 * 2 + j % 2]);
  }
};
}  // namespace torch_curvature::cuda
