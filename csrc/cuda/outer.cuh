// outer: out[b, i, j] = u[b, i] v[b, j]
// Shapes: u [B, m], v [B, n] of any strides, out [B, m, n] contiguous. Bytes moved: B m n elements written, B (m + n)
// read (v again for every row, from cache). A block takes kOuterChunk bytes of the output, whatever rows they belong
// to; a thread writes kOuterVectors times 16 bytes. The chunk's first row is found by 64-bit division once, all that
// follows by 32-bit arithmetic.
#pragma once
#include "numbers.cuh"

namespace torch_curvature::cuda {

constexpr int kOuterThreads = 256, kOuterVectors = 4;

struct OuterShape {
  int64_t batch, m, n;
  int64_t u_batch, u_row, v_batch, v_col;  // strides, in elements
};

// Splits an offset below `limit` past `base` (itself below `size`) into whole sizes and what is left of base + offset.
__device__ __forceinline__ int64_t carry(int64_t& base, int64_t offset, int64_t size, int64_t limit) {
  int64_t at = base + offset, whole;
  if (size >= limit) {
    whole = at >= size;
  } else {  // both below 2 limit: 32 bits do
    whole = static_cast<unsigned>(at) / static_cast<unsigned>(size);
  }
  base = at - whole * size;
  return whole;
}

// Width elements a store. RowVectors: n is a multiple of Width and rows of v allow loads of that width.
template <class T, int Width, bool RowVectors>
__global__ void __launch_bounds__(kOuterThreads, 3)
    outer_kernel(const T* __restrict__ u, const T* __restrict__ v, T* __restrict__ out, OuterShape s) {
  constexpr int64_t kChunk = int64_t(kOuterThreads) * kOuterVectors * Width;
  const int64_t total = s.batch * s.m * s.n;
  CURVATURE_GRID_STRIDE(chunk, ceil_div(total, kChunk)) {
    const int64_t first_row = chunk * kChunk / s.n, first_col = chunk * kChunk - first_row * s.n;
    const int64_t first_batch = first_row / s.m, first_i = first_row - first_batch * s.m;
#pragma unroll
    for (int q = 0; q < kOuterVectors; ++q) {
      const int64_t offset = (int64_t(q) * kOuterThreads + threadIdx.x) * Width, e = chunk * kChunk + offset;
      if (e >= total) break;
      int64_t j = first_col, i = first_i, b = first_batch;
      b += carry(i, carry(j, offset, s.n, kChunk), s.m, kChunk + 1);
      accumulate_t<T> x = widen(u[b * s.u_batch + i * s.u_row]);
      Pack<T, Width> result;
      if constexpr (RowVectors) {
        const auto y = load_pack<Width>(v + b * s.v_batch + j);
#pragma unroll
        for (int k = 0; k < Width; ++k) result.v[k] = narrow<T>(x * widen(y.v[k]));
        store_pack(out + e, result);
      } else {
        const int count = total - e < Width ? static_cast<int>(total - e) : Width;
#pragma unroll
        for (int k = 0; k < Width; ++k) {
          if (k < count) result.v[k] = narrow<T>(x * widen(v[b * s.v_batch + j * s.v_col]));
          if (++j == s.n && k + 1 < count) {
            j = 0;
            if (++i == s.m) i = 0, ++b;
            x = widen(u[b * s.u_batch + i * s.u_row]);
          }
        }
        if (count == Width) {
          store_pack(out + e, result);
        } else {
#pragma unroll
          for (int k = 0; k < Width; ++k)
            if (k < count) out[e + k] = result.v[k];
        }
      }
    }
  }
}

template <class T>
void launch_outer(const T* u, const T* v, T* out, const OuterShape& s, cudaStream_t stream) {
  constexpr int kWidth = kPerVector<T>;
  const int64_t total = s.batch * s.m * s.n;
  if (total == 0) return;
  const bool wide = vector_aligned(out);
  const bool rows = wide && s.v_col == 1 && vector_aligned(v, s.n, s.v_batch);
  const dim3 grid = grid_blocks(ceil_div<int64_t>(total, int64_t(kOuterThreads) * kOuterVectors * (wide ? kWidth : 1)));
  auto* kernel = rows   ? outer_kernel<T, kWidth, true>
                 : wide ? outer_kernel<T, kWidth, false>
                        : outer_kernel<T, 1, false>;
  launch(kernel, grid, dim3(kOuterThreads), stream, u, v, out, s);
}
}  // namespace torch_curvature::cuda
