// The CUDA C++ functions that kernels call, as the engine does them.
#pragma once
#include <cmath>

#include "engine.hpp"

using Here = std::source_location;

inline void __syncthreads(Here at = Here::current()) { cuda_emulator::Engine::get().block_barrier(at.line()); }
inline void __syncwarp(unsigned mask = ~0u, Here at = Here::current()) {
  cuda_emulator::Engine::get().exchange(mask, nullptr, 0, "__syncwarp", at.line());
}

namespace cuda_emulator {
// The value that lane `from` holds; the lane's own where `from` is negative (out of the shuffle's width).
template <class T>
T shuffle(unsigned mask, T value, int from, const char* name, unsigned line) {
  Engine& e = Engine::get();
  auto* slots = e.exchange(mask, &value, sizeof value, name, line);
  if (from < 0) return value;
  if (!(mask >> from & 1)) e.fail(std::string(name) + ": reads a lane outside its mask");
  T r;
  std::memcpy(&r, slots[from], sizeof r);
  return r;
}
}  // namespace cuda_emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int x, int width = 32, Here at = Here::current()) {
  const int me = cuda_emulator::Engine::get().lane(), from = me ^ x;
  return cuda_emulator::shuffle(mask, value, (from & ~(width - 1)) > (me & ~(width - 1)) ? -1 : from, "__shfl_xor_sync",
                                at.line());
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, Here at = Here::current()) {
  const int me = cuda_emulator::Engine::get().lane();
  return cuda_emulator::shuffle(mask, value, (me & (width - 1)) + int(delta) < width ? me + int(delta) : -1,
                                "__shfl_down_sync", at.line());
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
