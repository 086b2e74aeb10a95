// The tensor-core instructions by themselves, for the test of their layouts. One warp.
#include "driver.hpp"
#include "numbers.cuh"
#include "ptx.cuh"

using namespace torch_curvature::cuda;

// a [2][32][4], b [32][4] registers of 16 or 32 bits (two blocks of rows, two of columns), d [2][2][32][4]: d += a b
template <class T>
static void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t x[2][4], y[1][4];
  float c[2][2][4];
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 2; ++i) x[i][r] = a[(i * 32 + lane) * 4 + r];
    y[0][r] = b[lane * 4 + r];
    for (int i = 0; i < 4; ++i) c[i / 2][i % 2][r] = d[(i * 32 + lane) * 4 + r];
  }
  mma_tiles<T, 2, 2>(c, x, y);
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) d[(i * 32 + lane) * 4 + r] = c[i / 2][i % 2][r];
}
// a [2][32], b [2][32], d [2][2][32][2]
static void mma_double_kernel(const double* a, const double* b, double* d) {
  const int lane = threadIdx.x;
  const double x[2] = {a[lane], a[32 + lane]}, y[2] = {b[lane], b[32 + lane]};
  double c[2][4];
  for (int r = 0; r < 8; ++r) c[r / 4][r % 4] = d[(r / 2 * 32 + lane) * 2 + r % 2];
  mma_tiles<2, 2>(c, x, y);
  for (int r = 0; r < 8; ++r) d[(r / 2 * 32 + lane) * 2 + r % 2] = c[r / 4][r % 4];
}
static cuda_emulator::Register mma_case("mma", [](const cuda_emulator::Case& c) {
  if (c.format == "float64") {
    launch(mma_double_kernel, dim3(1), dim3(32), nullptr, static_cast<const double*>(c.buffer<double>(0)),
           static_cast<const double*>(c.buffer<double>(1)), c.buffer<double>(2));
    return;
  }
  auto* kernel = c.format == "tf32"      ? mma_kernel<Tf32>
                 : c.format == "float16" ? mma_kernel<__half>
                                         : mma_kernel<__nv_bfloat16>;
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
  c.format == "float16" ? convert<__half>(c) : convert<__nv_bfloat16>(c);
});

// Rounding to TF32: buffers: float32 values, the rounded ones
static cuda_emulator::Register rounding("round_to_tf32", [](const cuda_emulator::Case& c) {
  for (int64_t i = 0; i < c.buffers[0].bytes / 4; ++i) c.buffer<uint32_t>(1)[i] = round_to_tf32(c.buffer<float>(0)[i]);
});
