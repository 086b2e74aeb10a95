// The CUDA types that kernels name, for a compiler that knows none of them: vectors of indices, bfloat16 and half.
// Conversions round to nearest even, as the device's do; a test holds them against torch's for every bit pattern.
#pragma once
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace cuda_emulator {
template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40);  // a quiet NaN
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float half_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline uint16_t half_bits(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds past 65504
  if (magnitude < 0x38800000u) {                                              // below 2^-14: a multiple of 2^-24
    const float scaled = bits<float>(magnitude) + 0.5f;                       // the float's own rounding, at 2^-24
    return static_cast<uint16_t>(sign | (bits<uint32_t>(scaled) - bits<uint32_t>(0.5f)));
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}
}  // namespace cuda_emulator

struct __nv_bfloat16 {
  uint16_t raw;
};
struct __half {
  uint16_t raw;
};
inline float __bfloat162float(__nv_bfloat16 x) { return cuda_emulator::bits<float>(uint32_t(x.raw) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {cuda_emulator::bfloat16_bits(x)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.raw; }
inline float __half2float(__half x) { return cuda_emulator::half_value(x.raw); }
inline __half __float2half_rn(float x) { return {cuda_emulator::half_bits(x)}; }
