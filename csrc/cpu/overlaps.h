// Inner products of rows where they lie.
//
// Few positions: out[v] = sum_st (a_s . a_t + one)(g_vs . g_vt) straight from the rows of a and g, without packing
// them.
//
// Shapes: a [S, I], g [V, S, O], both with contiguous rows of whole vectors (zero up to there), out [V]; one is 1 where
// a has a last entry of ones, which is not stored, else 0. A block of R x R pairs (s, t) is summed in registers, s <=
// t; the overlaps of a are needed as numbers, those of g only as vectors that are weighted and added up. Multiply-adds:
// (V O + I) S (S + 1) / 2, each operand read S / R times from the caches.
#pragma once
#include "ahead.h"
#include "simd.h"

#include <algorithm>
#include <cstdint>

namespace torch_curvature::cpu {

template <class A>
struct Rows {
  const A* data;
  int64_t column, row, depth;  // strides of v (g only) and s, and the length of a row
};

// Of two vectors of L lanes, x and y behind it, the halves of groups of 2 half lanes: half = L / 2, L / 4, .., 1. A
// table, since the compiler would put such vectors together whenever they are needed.
template <class Integer, int L>
struct Halves {
  alignas(64) Integer low[4][L] = {}, high[4][L] = {};
  constexpr Halves() {
    int step = 0;
    for (int half = L / 2; half > 0; half /= 2, ++step)
      for (int p = 0; p < L; ++p) {
        const int group = p / half, groups = L / half / 2;  // of x first, then of y
        low[step][p] = group % groups * 2 * half + p % half + (group < groups ? 0 : L);
        high[step][p] = low[step][p] + half;
      }
  }
};

#define CURVATURE_OVERLAPS_NAME overlaps_generic
#define CURVATURE_OVERLAPS_TARGET
#define CURVATURE_OVERLAPS_BYTES 16
#define CURVATURE_OVERLAPS_ROWS 3
#include "overlaps_body.h"

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define CURVATURE_OVERLAPS_NAME overlaps_v3
#define CURVATURE_OVERLAPS_TARGET __attribute__((target("arch=x86-64-v3")))
#define CURVATURE_OVERLAPS_BYTES 32
#define CURVATURE_OVERLAPS_ROWS 3
#include "overlaps_body.h"

#define CURVATURE_OVERLAPS_NAME overlaps_v4
#define CURVATURE_OVERLAPS_TARGET __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define CURVATURE_OVERLAPS_BYTES 64
#define CURVATURE_OVERLAPS_ROWS 4
#include "overlaps_body.h"
#endif

// The best for this processor, its numbers in a vector, and the edge R of its blocks.
template <class A>
struct Overlaps {
  void (*sum)(Rows<A> a, Rows<A> g, int64_t S, int64_t V, A one, Ahead& ahead, A* lanes, A* out);
  // (x, row, count, depth, sums): sums[r, c] += x_r . x_c, r <= c, of `count` rows that are `row` apart, of whole
  // vectors
  void (*inner)(const A*, int64_t, int64_t, int64_t, A*);
  int64_t lanes, rows;
};

template <class A>
Overlaps<A> overlaps() {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
  static const Overlaps<A> best =
      __builtin_cpu_supports("x86-64-v4") ? Overlaps<A>{&overlaps_v4<A>, &overlaps_v4_inner<A>, 64 / sizeof(A), 4}
      : __builtin_cpu_supports("x86-64-v3")
          ? Overlaps<A>{&overlaps_v3<A>, &overlaps_v3_inner<A>, 32 / sizeof(A), 3}
          : Overlaps<A>{&overlaps_generic<A>, &overlaps_generic_inner<A>, 16 / sizeof(A), 3};
  return best;
#else
  return {&overlaps_generic<A>, &overlaps_generic_inner<A>, 16 / sizeof(A), 3};
#endif
}
}  // namespace torch_curvature::cpu
