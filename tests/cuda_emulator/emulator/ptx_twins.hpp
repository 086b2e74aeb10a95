// What the instructions of ptx.cuh do, lane by lane. The layouts of fragments are tables, written out from the PTX ISA
// manual's figures ("Matrix fragments for mma.m16n8k16 with floating point type", "Warp-level matrix load instruction:
// ldmatrix") and held by a test against an independent description of them.
#pragma once
#include "engine.hpp"

namespace cuda_emulator {
// Instrumented, unlike the bookkeeping around it: the sanitizers see the copy when it lands.
inline void land(const Copy& c) {
  if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
  else std::memset(c.to, 0, 16);
}

// Which element of its matrix a lane holds in register r, half h (h: 0 low, 1 high; the accumulators have one per
// register).
struct Element {
  int row, column;
};
constexpr Element fragment_a(int lane, int r, int h) { return {lane / 4 + r % 2 * 8, lane % 4 * 2 + h + r / 2 * 8}; }
constexpr Element fragment_b(int lane, int r, int h) { return {lane % 4 * 2 + h + r * 8, lane / 4}; }
constexpr Element fragment_c(int lane, int r) { return {lane / 4 + r / 2 * 8, lane % 4 * 2 + r % 2}; }
}  // namespace cuda_emulator

namespace torch_curvature::cuda {
using cuda_emulator::Engine;

EMULATOR_RAW inline void cp_async_16(void* shared, const void* global, bool valid) {
  Engine& e = Engine::get();
  if ((reinterpret_cast<uintptr_t>(shared) | (valid ? reinterpret_cast<uintptr_t>(global) : 0)) & 15)
    e.fail("cp.async: address not aligned to 16 bytes");
  auto& l = e.current();
  if (l.last - l.first == cuda_emulator::kMaxCopies) e.fail("cp.async: too many copies in flight");
  const cuda_emulator::Copy c{shared, global, valid ? 16u : 0u, l.committed};
  if (e.options.lazy_copies) l.copies[l.last++ % cuda_emulator::kMaxCopies] = c;
  else cuda_emulator::land(c);
}
EMULATOR_RAW inline void cp_async_commit() { ++Engine::get().current().committed; }
template <int Pending>
EMULATOR_RAW void cp_async_wait() {
  auto& l = Engine::get().current();
  for (; l.first != l.last && l.copies[l.first % cuda_emulator::kMaxCopies].group + Pending < l.committed; ++l.first)
    cuda_emulator::land(l.copies[l.first % cuda_emulator::kMaxCopies]);
}

template <bool Transposed>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, Here at = Here::current()) {
  Engine& e = Engine::get();
  if (reinterpret_cast<uintptr_t>(row) & 15) e.fail("ldmatrix: row not aligned to 16 bytes");
  auto* rows = e.exchange(~0u, &row, sizeof row, "ldmatrix", at.line());
  const int lane = e.lane();
  for (int m = 0; m < 4; ++m) {
    uint32_t pair = 0;
    for (int k = 0; k < 2; ++k) {
      // Lane l holds elements (l / 4, 2 (l % 4)) and the next of its row; with .trans, of the transposed matrix.
      const int i = Transposed ? lane % 4 * 2 + k : lane / 4, j = Transposed ? lane / 4 : lane % 4 * 2 + k;
      const unsigned char* p;
      std::memcpy(&p, rows[m * 8 + i], sizeof p);
      uint16_t v;
      std::memcpy(&v, p + j * 2, 2);
      pair |= uint32_t(v) << 16 * k;
    }
    r[m] = pair;
  }
}

namespace twin {
inline float value(__nv_bfloat16*, uint16_t raw) { return __bfloat162float({raw}); }
inline float value(__half*, uint16_t raw) { return __half2float({raw}); }
}  // namespace twin

// d += a b. Every lane gathers the fragments of all, unfolds them into matrices, and computes its own four elements.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Here at = Here::current()) {
  Engine& e = Engine::get();
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto* slots = e.exchange(~0u, mine, sizeof mine, "mma", at.line());
  const int me = e.lane();
  for (int r = 0; r < 4; ++r) {
    const auto [row, column] = cuda_emulator::fragment_c(me, r);
    float sum = 0;
    for (int lane = row % 8 * 4, k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;  // the lane of its group of four, for a and b alike
      uint32_t x, y;
      std::memcpy(&x, slots[lane + holder] + (row / 8 + k / 8 * 2) * 4, 4);
      std::memcpy(&y, slots[column * 4 + holder] + (4 + k / 8) * 4, 4);
      sum += twin::value(static_cast<T*>(nullptr), uint16_t(x >> 16 * (k & 1))) *
             twin::value(static_cast<T*>(nullptr), uint16_t(y >> 16 * (k & 1)));
    }
    d[r] += sum;
  }
}
}  // namespace torch_curvature::cuda
