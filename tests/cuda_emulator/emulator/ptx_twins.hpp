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

inline uint32_t round_to_tf32(float x) {
  const uint32_t u = cuda_emulator::bits<uint32_t>(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return u;  // infinity, NaN
  return (u + 0x1000u) & ~0x1fffu;  // 13 bits are dropped; half of the last kept one rounds away from zero
}

// How a format's fragments hold the 32 bytes of a row of a and of a column of b: kDepth elements, of which element k
// lies in 32-bit register (k / kHalf) of lane (k % kHalf) / kPacked of the row's four lanes, kPacked to a register.
namespace twin {
template <class T>
struct Format {
  static constexpr int kDepth = 16, kHalf = 8, kPacked = 2;
  static float value(uint32_t held, int k) {
    const auto raw = uint16_t(held >> 16 * (k % 2));
    if constexpr (std::is_same_v<T, __half>) return __half2float({raw});
    else return __bfloat162float({raw});
  }
};
template <>
struct Format<Tf32> {
  static constexpr int kDepth = 8, kHalf = 4, kPacked = 1;
  static float value(uint32_t held, int) { return cuda_emulator::bits<float>(held & ~0x1fffu); }  // the rest is ignored
};

// The values of a row (column) whose lanes start at `lane`; first: the register that holds its element 0, and `step`
// registers on the one that holds element kHalf.
template <class T>
void gather(float (&to)[16], unsigned char (*slots)[cuda_emulator::kSlotBytes], int lane, int first, int step) {
  using F = Format<T>;
  for (int k = 0; k < F::kDepth; ++k) {
    uint32_t held;
    std::memcpy(&held, slots[lane + k % F::kHalf / F::kPacked] + (first + k / F::kHalf * step) * 4, 4);
    to[k] = F::value(held, k);
  }
}
}  // namespace twin

// Every lane gathers the rows and columns of its own elements from the fragments of all: rows lane / 4 and 8 more of
// each block, in registers r and r + 2 of it; columns 2 (lane % 4) and the next.
template <class T, int Rows, int Columns>
void mma_tiles(float (&d)[Rows][Columns][4], const uint32_t (&a)[Rows][4], const uint32_t (&b)[Columns / 2][4],
               Here at = Here::current()) {
  Engine& e = Engine::get();
  uint32_t mine[Rows * 4 + Columns * 2];
  std::memcpy(mine, a, sizeof a);
  std::memcpy(mine + Rows * 4, b, sizeof b);
  auto* slots = e.exchange(~0u, mine, sizeof mine, "mma", at.line());
  const int lane = e.lane();
  float rows[Rows * 2][16], columns[Columns * 2][16];
  for (int i = 0; i < Rows * 2; ++i) twin::gather<T>(rows[i], slots, lane / 4 * 4, i / 2 * 4 + i % 2, 2);
  for (int j = 0; j < Columns * 2; ++j)
    twin::gather<T>(columns[j], slots, (lane % 4 * 2 + j % 2) * 4, Rows * 4 + j / 2 * 2, 1);
  for (int i = 0; i < Rows * 2; ++i)
    for (int j = 0; j < Columns * 2; ++j) {
      float sum = 0;
      for (int k = 0; k < twin::Format<T>::kDepth; ++k) sum += rows[i][k] * columns[j][k];
      d[i / 2][j / 2][i % 2 * 2 + j % 2] += sum;
    }
}

// Lane 4 i + k holds element (i, k) of a and (k, i) of b; lane 4 i + k the results (i, 2 k) and (i, 2 k + 1).
template <int Rows, int Columns>
void mma_tiles(double (&d)[Rows][2 * Columns], const double (&a)[Rows], const double (&b)[Columns],
               Here at = Here::current()) {
  Engine& e = Engine::get();
  double mine[Rows + Columns];
  std::memcpy(mine, a, sizeof a);
  std::memcpy(mine + Rows, b, sizeof b);
  auto* slots = e.exchange(~0u, mine, sizeof mine, "mma", at.line());
  const int row = e.lane() / 4, column = e.lane() % 4 * 2;
  for (int k = 0; k < 4; ++k) {
    double x[Rows], y[2 * Columns];
    std::memcpy(x, slots[row * 4 + k], sizeof x);
    for (int j = 0; j < 2 * Columns; ++j) std::memcpy(&y[j], slots[(column + j % 2) * 4 + k] + (Rows + j / 2) * 8, 8);
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < 2 * Columns; ++j) d[i][j] += x[i] * y[j];
  }
}
}  // namespace torch_curvature::cuda
