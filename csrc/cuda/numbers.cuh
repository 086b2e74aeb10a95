// Formats of numbers: what each is accumulated in, conversions, and groups that move as one 128-bit access.
#pragma once
#include "launch.cuh"

namespace torch_curvature::cuda {

// A float32 in memory whose products may be taken in TF32 (10 bits of mantissa, sums in float32): the element type of
// kernels that multiply where torch's own setting allows TF32.
struct Tf32 {
  float value;
};
#ifndef TORCH_CURVATURE_EMULATOR
using ::__ldg;
__device__ __forceinline__ Tf32 __ldg(const Tf32* p) { return {::__ldg(&p->value)}; }
#endif

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// float64 sums in float64, all others in float32.
template <class T>
using accumulate_t = typename Accumulate<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Tf32 x) { return x.value; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, Tf32>) return {x};
  else return x;
}

template <class T, int Count>
struct alignas(Count * sizeof(T)) Pack {
  T v[Count];
};
constexpr int kVectorBytes = 16;
template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

template <int Count, class T>
__device__ __forceinline__ Pack<T, Count> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, Count>*>(p);
}
template <int Count, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, Count>& x) {
  *reinterpret_cast<Pack<T, Count>*>(p) = x;
}

// Whether 128-bit accesses may start at p and at every multiple of these strides (in elements) from it.
template <class T, class... Strides>
bool vector_aligned(const T* p, Strides... strides) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && ((strides % kPerVector<T> == 0) && ...);
}

// Sum over a group of neighbouring lanes; every lane of the warp takes part, and every lane of the group gets the sum.
template <int Lanes, class A>
__device__ __forceinline__ A sum_lanes(A x) {
#pragma unroll
  for (int d = Lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(kFullWarp, x, d);
  return x;
}

// Sum over all threads of the block, in a fixed order; all of them call it, and all get the sum. `partial` holds one
// value a warp; it may be used again right away.
template <int Threads, class A>
__device__ __forceinline__ A sum_block(A x, A (&partial)[Threads / 32]) {
  x = sum_lanes<32>(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < Threads / 32; ++w) x += partial[w];
  __syncthreads();
  return x;
}
}  // namespace torch_curvature::cuda
