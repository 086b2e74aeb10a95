// The tensor-core instructions by themselves, for the test of their layouts. One warp.
#include "driver.hpp"
#include "numbers.cuh"
#include "ptx.cuh"

using namespace torch_curvature::cuda;

// a [32][4], b [32][2] registers of two 16-bit elements, d [32][4] floats: d += a b
template <class T>
static void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  const uint32_t x[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  float c[4] = {d[lane * 4], d[lane * 4 + 1], d[lane * 4 + 2], d[lane * 4 + 3]};
  mma_m16n8k16<T>(c, x, b[lane * 2], b[lane * 2 + 1]);
  for (int r = 0; r < 4; ++r) d[lane * 4 + r] = c[r];
}
static cuda_emulator::Register mma("mma", [](const cuda_emulator::Case& c) {
  auto* kernel = c.dtype == "float16" ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>;
  launch(kernel, dim3(1), dim3(32), nullptr, static_cast<const uint32_t*>(c.buffer<uint32_t>(0)),
         static_cast<const uint32_t*>(c.buffer<uint32_t>(1)), c.buffer<float>(2));
});

// from: four 8x8 matrices of 16-bit elements, to [32][4] registers
template <bool Transposed>
static void ldmatrix_kernel(const uint16_t* from, uint32_t* to) {
  uint32_t r[4];
  ldmatrix_x4<Transposed>(r, from + threadIdx.x * 8);
  for (int m = 0; m < 4; ++m) to[threadIdx.x * 4 + m] = r[m];
}
// integers: transposed
static cuda_emulator::Register ldmatrix("ldmatrix", [](const cuda_emulator::Case& c) {
  launch(c[0] ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, dim3(1), dim3(32), nullptr,
         static_cast<const uint16_t*>(c.buffer<uint16_t>(0)), c.buffer<uint32_t>(1));
});

// Conversions: buffers: 16-bit patterns, their float32 values; float32 values, their 16-bit patterns
template <class T>
static void convert(const cuda_emulator::Case& c) {
  for (int64_t i = 0; i < c.buffers[0].bytes / 2; ++i) c.buffer<float>(1)[i] = widen(c.buffer<T>(0)[i]);
  for (int64_t i = 0; i < c.buffers[2].bytes / 4; ++i) c.buffer<T>(3)[i] = narrow<T>(c.buffer<float>(2)[i]);
}
static cuda_emulator::Register conversions("conversions", [](const cuda_emulator::Case& c) {
  c.dtype == "float16" ? convert<__half>(c) : convert<__nv_bfloat16>(c);
});
