// How CPU kernels get vector code for the processor they run on without being tied to the one they were built on.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

// The loader picks the best of the clones once; a plain loop in such a function reaches what -march=native gives.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CURVATURE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CURVATURE_CLONES
#endif
#define CURVATURE_INLINE inline __attribute__((always_inline))
#define CURVATURE_JOIN_(a, b) a##b
#define CURVATURE_JOIN(a, b) CURVATURE_JOIN_(a, b)

namespace torch_curvature::cpu {

// Half types accumulate in float32, the others in their own precision.
template <class T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<c10::Half> {
  using type = float;
};
template <>
struct Accumulate<c10::BFloat16> {
  using type = float;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace torch_curvature::cpu
