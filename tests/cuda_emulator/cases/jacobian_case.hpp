// What the cases of the contractions of Jacobians have in common.
#pragma once
#include "driver.hpp"
#include "jacobian.cuh"

// integers from `at` on: V N S O I, strides g_v g_n g_s a_n a_s
template <class T>
torch_curvature::cuda::Jacobian<T> jacobian(const cuda_emulator::Case& c, size_t g, size_t a, size_t at = 0) {
  return {c.buffer<T>(g), c.buffer<T>(a), c[at],     c[at + 1], c[at + 2], c[at + 3],
          c[at + 4],      c[at + 5],      c[at + 6], c[at + 7], c[at + 8], c[at + 9]};
}
// A workspace of just the size asked for, full of NaN.
template <class A>
struct Workspace {
  A* data = nullptr;
  explicit Workspace(int64_t count) : data(static_cast<A*>(std::malloc(count ? count * sizeof(A) : 1))) {
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<A>(NAN);
  }
  ~Workspace() { std::free(data); }
};
