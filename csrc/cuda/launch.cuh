// How kernels are launched, how they get shared memory, and how large a grid may be. With ptx.cuh the only header that
// knows whether nvcc compiles the kernels for a GPU or g++ for the emulator of tests/cuda_emulator.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef TORCH_CURVATURE_EMULATOR
#include "cuda_emulator.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace torch_curvature::cuda {

#ifdef TORCH_CURVATURE_EMULATOR
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t, A... args) {
  auto call = [&] { kernel(args...); };
  cuda_emulator::Engine::get().run_grid(grid, block, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}
template <class T>
T& shared_storage() {
  return *reinterpret_cast<T*>(cuda_emulator::Engine::get().shared_memory(&cuda_emulator::shared_key<T>, sizeof(T)));
}
inline int64_t max_blocks() { return cuda_emulator::Engine::get().options.max_blocks; }
inline int64_t max_workspace_bytes() { return cuda_emulator::Engine::get().options.max_workspace_bytes; }
#else
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, A... args) {
  // clang-format off
  kernel<<<grid, block, 0, stream>>>(args...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("torch_curvature: kernel launch failed: ") + cudaGetErrorString(error));
}
template <class T>
__device__ __forceinline__ T& shared_storage() {
  __shared__ __align__(128) unsigned char raw[sizeof(T)];
  return *reinterpret_cast<T*>(raw);
}
// Enough for any GPU to be full many times over; kernels stride over what is left.
inline int64_t max_blocks() { return 1 << 20; }
// What a kernel may ask for in one go; larger work is done piece by piece.
inline int64_t max_workspace_bytes() { return 256 << 20; }
#endif

constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// A grid for `items` pieces of work, over which the kernel strides by gridDim.x.
inline dim3 grid_blocks(int64_t items) {
  return dim3(static_cast<unsigned>(items < max_blocks() ? items : max_blocks()));
}

// A kernel launched for `items` blocks of work gives every block its share, whatever the grid.
#define CURVATURE_GRID_STRIDE(item, items) for (int64_t item = blockIdx.x; item < (items); item += gridDim.x)
}  // namespace torch_curvature::cuda
