// exp of many numbers that are not positive, in vector code.
//
// exp(x) = 2^n exp(r) with n the integer nearest to x / ln 2 and |r| <= ln 2 / 2, and exp(r) from its Taylor series,
// whose first term left out is less than half a unit in the last place. 2^n is multiplied in two halves, so that
// results below the smallest normal number are rounded as any other; exp(0) is exactly 1, NaN stays NaN.
#pragma once
#include "simd.h"

#include <bit>
#include <cstdint>

namespace torch_curvature::cpu {
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  using Integer = int32_t;
  static constexpr int kDegree = 7, kBits = 23, kBias = 127;
  static constexpr float kLowest = -150.f, kHigh = 0.693145751953125f, kLow = 1.42860682030941723212e-6f;
  static constexpr float kMagic = 12582912.f;  // 1.5 x 2^23: adding it rounds to an integer
};
template <>
struct Exponential<double> {
  using Integer = int64_t;
  static constexpr int kDegree = 13, kBits = 52, kBias = 1023;
  static constexpr double kLowest = -1100., kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
  static constexpr double kMagic = 6755399441055744.;  // 1.5 x 2^52
};

// 1 / d! for d = 0, 1, ..
template <class T>
struct Taylor {
  T of[16] = {};
  constexpr Taylor() {
    double factorial = 1;
    for (int d = 0; d < 16; factorial *= ++d) of[d] = static_cast<T>(1 / factorial);
  }
  constexpr T operator[](int d) const { return of[d]; }
};

// x[k] = exp(x[k]) for x[k] <= 0.
template <class T>
CURVATURE_CLONES void exponentials(T* __restrict__ x, int64_t count) {
  using E = Exponential<T>;
  using Integer = typename E::Integer;
  constexpr T kLog2E = T(1.44269504088896340736);
  constexpr Taylor<T> kTaylor;
  for (int64_t k = 0; k < count; ++k) {
    const T given = x[k] < E::kLowest ? E::kLowest : x[k];
    const T shifted = given * kLog2E + E::kMagic, n = shifted - E::kMagic;
    const T r = (given - n * E::kHigh) - n * E::kLow;
    T sum = kTaylor[E::kDegree];
#pragma GCC unroll 16
    for (int d = E::kDegree - 1; d >= 0; --d) sum = sum * r + kTaylor[d];
    const Integer power = std::bit_cast<Integer>(shifted) - std::bit_cast<Integer>(E::kMagic), half = power >> 1;
    const T first = std::bit_cast<T>(Integer((half + E::kBias) << E::kBits)),
            second = std::bit_cast<T>(Integer((power - half + E::kBias) << E::kBits));
    x[k] = sum * first * second;
  }
}
}  // namespace torch_curvature::cpu
