// frobenius_inner: out[b] = sum_ij x[b, i, j] y[b, i, j]
// Shapes: x, y [B, m, n] of any strides, out [B]. Bytes moved: 2 B m n elements read.
// A group of 8 or 32 lanes, or a whole block, sums one piece of one matrix; pieces of one matrix, where there are
// too few matrices to fill a GPU, are added in order by a second kernel. Both operands contiguous: 128-bit loads, four
// in flight per operand. Else: patches of 32 x 32 along the fast axis of one operand; the other's cache lines stay in
// L1 until the patch has used them up.
#pragma once
#include "numbers.cuh"

namespace torch_curvature::cuda {

constexpr int kFrobeniusThreads = 256, kFrobeniusUnroll = 4, kFrobeniusPatch = 32;

template <class T>
struct FrobeniusOperand {
  const T* data;
  int64_t batch, row, col;  // strides, in elements
};

template <class T>
struct FrobeniusProblem {
  FrobeniusOperand<T> x, y;
  int64_t batch, m, n;
  int64_t pieces;  // of each matrix; more than one: their sums go to `partial` [B, pieces]
  int64_t units;   // of each matrix: loads, or patches
};

struct FrobeniusShared {
  double partial_wide[kFrobeniusThreads / 32];
  float partial[kFrobeniusThreads / 32];
};
__device__ __forceinline__ auto& frobenius_partial(FrobeniusShared& s, float) { return s.partial; }
__device__ __forceinline__ auto& frobenius_partial(FrobeniusShared& s, double) { return s.partial_wide; }

template <int Width, class T>
__device__ __forceinline__ accumulate_t<T> pack_product(const Pack<T, Width>& x, const Pack<T, Width>& y,
                                                        accumulate_t<T> sum) {
#pragma unroll
  for (int k = 0; k < Width; ++k) sum += widen(x.v[k]) * widen(y.v[k]);
  return sum;
}

// Thread `me` of Group sums its share of [first, last) of two contiguous arrays, in units of Width elements.
template <int Group, int Width, class T>
__device__ __forceinline__ accumulate_t<T> sum_contiguous(const T* __restrict__ x, const T* __restrict__ y,
                                                          int64_t first, int64_t last, int me) {
  accumulate_t<T> sums[kFrobeniusUnroll] = {};
  int64_t i = first + me;
  for (; i + (kFrobeniusUnroll - 1) * Group < last; i += kFrobeniusUnroll * Group) {
    Pack<T, Width> a[kFrobeniusUnroll], b[kFrobeniusUnroll];
#pragma unroll
    for (int k = 0; k < kFrobeniusUnroll; ++k) {
      a[k] = load_pack<Width>(x + (i + k * Group) * Width);
      b[k] = load_pack<Width>(y + (i + k * Group) * Width);
    }
#pragma unroll
    for (int k = 0; k < kFrobeniusUnroll; ++k) sums[k] = pack_product<Width>(a[k], b[k], sums[k]);
  }
  for (; i < last; i += Group)
    sums[0] = pack_product<Width>(load_pack<Width>(x + i * Width), load_pack<Width>(y + i * Width), sums[0]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same for patches [first, last) of two strided matrices; a warp takes a patch, a lane one column of it.
template <int Group, class T>
__device__ __forceinline__ accumulate_t<T> sum_patches(const FrobeniusOperand<T>& x, const FrobeniusOperand<T>& y,
                                                       int64_t m, int64_t n, int64_t first, int64_t last, int me) {
  constexpr int kLanes = Group < 32 ? Group : 32;
  const int64_t across = ceil_div<int64_t>(n, kFrobeniusPatch);
  accumulate_t<T> sum = 0;
  for (int64_t patch = first + me / 32; patch < last; patch += ceil_div(Group, 32)) {
    const int64_t i0 = patch / across * kFrobeniusPatch, j0 = patch % across * kFrobeniusPatch;
    const int64_t i1 = i0 + kFrobeniusPatch < m ? i0 + kFrobeniusPatch : m,
                  j1 = j0 + kFrobeniusPatch < n ? j0 + kFrobeniusPatch : n;
    for (int64_t j = j0 + me % kLanes; j < j1; j += kLanes) {
      const T *p = x.data + i0 * x.row + j * x.col, *q = y.data + i0 * y.row + j * y.col;
#pragma unroll 4
      for (int64_t i = i0; i < i1; ++i, p += x.row, q += y.row) sum += widen(__ldg(p)) * widen(__ldg(q));
    }
  }
  return sum;
}

// Group threads a piece. Width > 0: both contiguous, loads of Width elements; Width = 0: any strides.
template <class T, int Group, int Width>
__global__ void __launch_bounds__(kFrobeniusThreads, 2)
    frobenius_kernel(FrobeniusProblem<T> p, T* __restrict__ out, accumulate_t<T>* __restrict__ partial) {
  constexpr int kGroups = kFrobeniusThreads / Group;
  auto& scratch = frobenius_partial(shared_storage<FrobeniusShared>(), accumulate_t<T>(0));
  const int me = threadIdx.x % Group;
  const int64_t items = p.batch * p.pieces;
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(items, kGroups)) {
    const int64_t item = block * kGroups + threadIdx.x / Group;
    accumulate_t<T> sum = 0;
    if (item < items) {
      const int64_t b = item / p.pieces, piece = item - b * p.pieces;
      const int64_t first = p.units * piece / p.pieces, last = p.units * (piece + 1) / p.pieces;
      const T *x = p.x.data + b * p.x.batch, *y = p.y.data + b * p.y.batch;
      if constexpr (Width > 0) sum = sum_contiguous<Group, Width>(x, y, first, last, me);
      else
        sum = sum_patches<Group>(FrobeniusOperand<T>{x, 0, p.x.row, p.x.col},
                                 FrobeniusOperand<T>{y, 0, p.y.row, p.y.col}, p.m, p.n, first, last, me);
    }
    if constexpr (Group == kFrobeniusThreads) sum = sum_block<kFrobeniusThreads>(sum, scratch);
    else sum = sum_lanes<Group>(sum);
    if (me == 0 && item < items) {
      if (p.pieces > 1) partial[item] = sum;
      else out[item] = narrow<T>(sum);
    }
  }
}

// out[b] = sum of the pieces of matrix b, in a fixed order; a warp a matrix.
template <class T>
__global__ void __launch_bounds__(kFrobeniusThreads, 2)
    frobenius_finish_kernel(const accumulate_t<T>* __restrict__ partial, T* __restrict__ out, int64_t batch,
                            int64_t pieces) {
  constexpr int kWarps = kFrobeniusThreads / 32;
  CURVATURE_GRID_STRIDE(block, ceil_div<int64_t>(batch, kWarps)) {
    const int64_t b = block * kWarps + threadIdx.x / 32;
    accumulate_t<T> sum = 0;
    if (b < batch)
      for (int64_t k = threadIdx.x % 32; k < pieces; k += 32) sum += partial[b * pieces + k];
    sum = sum_lanes<32>(sum);
    if (b < batch && threadIdx.x % 32 == 0) out[b] = narrow<T>(sum);
  }
}

// Blocks that fill the largest GPU four times over, each with at least kFrobeniusPiece elements to sum.
constexpr int64_t kFrobeniusBlocks = 1024, kFrobeniusPiece = 16384;
inline int64_t frobenius_pieces(int64_t batch, int64_t m, int64_t n) {
  const int64_t wanted = ceil_div(kFrobeniusBlocks, batch), most = m * n / kFrobeniusPiece;
  return wanted < most ? wanted : most > 1 ? most : 1;
}
// Numbers of the accumulation type that launch_frobenius_inner wants at `partial`.
inline int64_t frobenius_workspace(int64_t batch, int64_t m, int64_t n) {
  const int64_t pieces = batch ? frobenius_pieces(batch, m, n) : 1;
  return pieces > 1 ? batch * pieces : 0;
}

template <class T, int Width>
void launch_frobenius_groups(FrobeniusProblem<T> p, T* out, accumulate_t<T>* partial, cudaStream_t stream) {
  const int64_t elements = p.m * p.n;
  if constexpr (Width > 0) p.units = elements / Width;
  else p.units = ceil_div<int64_t>(p.m, kFrobeniusPatch) * ceil_div<int64_t>(p.n, kFrobeniusPatch);
  auto start = [&](auto* kernel, int group) {
    launch(kernel, grid_blocks(ceil_div<int64_t>(p.batch * p.pieces, kFrobeniusThreads / group)),
           dim3(kFrobeniusThreads), stream, p, out, partial);
  };
  if (elements <= 8 * (Width ? Width : 4)) start(frobenius_kernel<T, 8, Width>, 8);
  else if (elements <= 2048) start(frobenius_kernel<T, 32, Width>, 32);
  else start(frobenius_kernel<T, kFrobeniusThreads, Width>, kFrobeniusThreads);
}

// Partial: frobenius_workspace() numbers, or null where it says none.
template <class T>
void launch_frobenius_inner(FrobeniusOperand<T> x, FrobeniusOperand<T> y, T* out, int64_t batch, int64_t m, int64_t n,
                            accumulate_t<T>* partial, cudaStream_t stream) {
  if (batch == 0) return;
  // The sum does not care which axis is called the row: let columns be the fast axis of x, or else of y.
  if (x.col != 1 && (x.row == 1 || (y.col != 1 && y.row == 1))) {
    const int64_t xr = x.row, yr = y.row, old = m;
    x.row = x.col, y.row = y.col, x.col = xr, y.col = yr, m = n, n = old;
  }
  const auto contiguous = [&](const FrobeniusOperand<T>& z) {
    return (z.col == 1 || n == 1) && (z.row == n || m == 1);
  };
  FrobeniusProblem<T> p{x, y, batch, m, n, frobenius_pieces(batch, m, n), 0};
  if (!contiguous(x) || !contiguous(y)) launch_frobenius_groups<T, 0>(p, out, partial, stream);
  else if (vector_aligned(x.data, m * n, x.batch) && vector_aligned(y.data, y.batch))
    launch_frobenius_groups<T, kPerVector<T>>(p, out, partial, stream);
  else launch_frobenius_groups<T, 1>(p, out, partial, stream);
  if (p.pieces > 1)
    launch(frobenius_finish_kernel<T>, grid_blocks(ceil_div<int64_t>(batch, kFrobeniusThreads / 32)),
           dim3(kFrobeniusThreads), stream, static_cast<const accumulate_t<T>*>(partial), out, batch, p.pieces);
}
}  // namespace torch_curvature::cuda
